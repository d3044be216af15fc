"""Everything that needs a GPU, stage by stage: python -m benchmarks.gpu OUT (make gpu OUT=folder)"""
