"""The benchmark: one harness for all shapes, front ends and devices.

cost.py says what a call must move and compute, workload.py and draws.py draw it, device.py names what cpu.py and
cuda.py do, paths.py calls the op, timing.py times it, command.py runs the cells, table.py and plot.py show them.
sweep.py has the cells and rules of benchmarks/sweeps.py.
"""
