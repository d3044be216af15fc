"""How well each precision mode fine-tunes: python -m benchmarks.accuracy"""
