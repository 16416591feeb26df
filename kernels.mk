# Compiles the CUDA kernels for each architecture (no GPU needed), prints registers, shared memory,
# spills and occupancy, and fails on a spill or a local-memory stack.
.PHONY: kernels
kernels:
	$(or $(PYTHON),python3) benchmarks/kernels.py
