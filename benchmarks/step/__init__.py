"""One optimizer step against its rivals: python -m benchmarks.step"""
