// The current addresses, shapes and dtypes of tensors, for the host's check before every step. Uses the C exchange API
// of DLPack (https://dmlc.github.io/dlpack, version 1.2 or newer of major version 1) if torch.Tensor has it: this needs
// no torch header, and takes a tenth of the time per tensor of Python's getters.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace drift {
namespace dlpack {

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null for a contiguous tensor
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace dlpack

// The descriptions of several tensors, as bytes: equal bytes mean equal descriptions.
class Descriptions {
 public:
  // `wrapper`: a tensor type whose memory is in another tensor, its attribute `inner`; or the type of None.
  Descriptions(const dlpack::ExchangeApi* api, PyTypeObject* tensor, PyTypeObject* wrapper, PyObject* inner)
      : api_(api), tensor_(tensor), wrapper_(wrapper), inner_(inner) {}

  void reserve(Py_ssize_t count) {
    addresses_.reserve(count * sizeof(int64_t));
    facts_.reserve(count * sizeof(Fact));
  }

  // A `thing` that is not a tensor gets address 0, which is never read or written.
  // `exact`: facts are equal only for the same objects with the same strides.
  void add(PyObject* thing, bool exact) {
    if (Py_TYPE(thing) == wrapper_) {
      PyObject* own = PyObject_GetAttr(thing, inner_);
      if (own == nullptr) throw pybind11::error_already_set();
      add_own(own, exact);
      Py_DECREF(own);
    } else {
      add_own(thing, exact);
    }
  }

  const std::string& addresses() const { return addresses_; }
  const std::string& facts() const { return facts_; }
  bool contiguous() const { return contiguous_; }

 private:
  void add_own(PyObject* thing, bool exact) {
    Fact fact{};
    int64_t address = 0;
    if (PyObject_TypeCheck(thing, tensor_)) {
      fact.is_tensor = 1;
      fact.identity = exact ? reinterpret_cast<uintptr_t>(thing) : 0;
      dlpack::Tensor tensor;
      if (api_->tensor_from_py_object_no_sync(thing, &tensor) == 0) {
        address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
        fact.has_memory = tensor.data != nullptr || is_empty(tensor);
        fact.dtype = tensor.dtype;
        fact.device = tensor.device;
        fact.shape = hash_on(0xcbf29ce484222325u ^ static_cast<uint64_t>(tensor.ndim), tensor.shape, tensor.ndim);
        if (!is_contiguous(tensor)) {
          contiguous_ = false;
          if (exact) fact.shape = hash_on(fact.shape, tensor.strides, tensor.ndim);
        }
      } else {
        PyErr_Clear();  // sparse, or a wrapper of other tensors
      }
    }
    append(addresses_, address);
    append(facts_, fact);
  }

  struct Fact {
    uint64_t identity;
    uint64_t shape;
    dlpack::Device device;
    dlpack::DataType dtype;
    uint16_t is_tensor;
    uint16_t has_memory;
  };
  static_assert(sizeof(Fact) == 32, "no padding: facts are compared byte by byte");

  // FNV-1a, word by word.
  static uint64_t hash_on(uint64_t hash, const int64_t* words, int32_t count) {
    for (int32_t i = 0; i < count; ++i) hash = (hash ^ static_cast<uint64_t>(words[i])) * 0x100000001b3u;
    return hash;
  }

  static bool is_empty(const dlpack::Tensor& tensor) {
    return std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t size) { return size == 0; });
  }

  static bool is_contiguous(const dlpack::Tensor& tensor) {
    if (tensor.strides == nullptr) return true;
    int64_t stride = 1;
    bool contiguous = true;
    for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
      if (tensor.shape[d] == 0) return true;
      contiguous = contiguous && (tensor.shape[d] == 1 || tensor.strides[d] == stride);
      stride *= tensor.shape[d];
    }
    return contiguous;
  }

  template <class T>
  static void append(std::string& bytes, const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  const dlpack::ExchangeApi* api_;
  PyTypeObject* tensor_;
  PyTypeObject* wrapper_;
  PyObject* inner_;
  std::string addresses_;
  std::string facts_;
  bool contiguous_ = true;
};

// The exchange API of torch.Tensor, from its capsule. Raises ValueError for an unknown version.
inline const dlpack::ExchangeApi* exchange_api(const pybind11::object& capsule) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw pybind11::error_already_set();
  if (api->version.major != 1 || api->version.minor < 2) {
    throw std::invalid_argument("DLPack " + std::to_string(api->version.major) + "." +
                                std::to_string(api->version.minor));
  }
  return api;
}

// How to describe tensors: through the exchange API, directly or through a wrapper's inner tensor.
struct Describer {
  const dlpack::ExchangeApi* api;
  pybind11::type tensor;
  pybind11::object wrapper;  // a type, or the type of None
  pybind11::str inner;

  Descriptions none() const {
    return {api, reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(wrapper.ptr()),
            inner.ptr()};
  }
};

inline pybind11::tuple as_tuple(const Descriptions& all) {
  return pybind11::make_tuple(pybind11::bytes(all.addresses()), pybind11::bytes(all.facts()), all.contiguous());
}

// Describes a list of tensors and Nones.
inline pybind11::tuple describe(const Describer& how, const pybind11::list& things, bool exact) {
  Descriptions all = how.none();
  const Py_ssize_t count = PyList_GET_SIZE(things.ptr());
  all.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) all.add(PyList_GET_ITEM(things.ptr(), i), exact);
  return as_tuple(all);
}

// Describes all values of a dict of dicts.
inline pybind11::tuple describe_values(const Describer& how, const pybind11::dict& dicts) {
  Descriptions all = how.none();
  all.reserve(4 * PyDict_GET_SIZE(dicts.ptr()));
  PyObject *key, *inner, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dicts.ptr(), &i, &key, &inner);) {
    if (!PyDict_Check(inner)) throw pybind11::type_error("expected a dict of dicts");
    for (Py_ssize_t j = 0; PyDict_Next(inner, &j, &key, &value);) all.add(value, true);
    all.add(Py_None, false);  // marks the end of each dict
  }
  return as_tuple(all);
}

inline void export_describe(pybind11::module_& m) {
  pybind11::class_<Describer>(m, "Describer")
      .def(pybind11::init(
               [](const pybind11::object& capsule, const pybind11::type& tensor, const pybind11::object& wrapper,
                  const pybind11::str& inner) { return Describer{exchange_api(capsule), tensor, wrapper, inner}; }),
           pybind11::arg("capsule"), pybind11::arg("tensor"), pybind11::arg("wrapper"), pybind11::arg("inner"));
  m.def("describe", &describe, pybind11::arg("how"), pybind11::arg("things"), pybind11::arg("exact"));
  m.def("describe_values", &describe_values, pybind11::arg("how"), pybind11::arg("dicts"));
}

}  // namespace drift
