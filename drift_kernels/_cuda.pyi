LAYOUT: dict[str, tuple[str, ...] | int]

class Target:
    def __init__(
        self,
        rows: int,
        device_rows: int,
        chunk_rows: int,
        grads: int,
        count: int,
        dtypes: tuple[str | None, str | None, str | None, str | None],
        device: int,
        stream: int,
    ) -> None: ...

def unusable(device: int) -> str | None: ...
def update(target: Target, coefficients: int) -> None: ...
def bias(target: Target, coefficients: int) -> None: ...
def grad_stats(target: Target, partials: int, out: int) -> None: ...
