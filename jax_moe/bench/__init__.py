"""The benchmark: one harness for all shapes, front ends and devices.

cost.py says what a call must move and compute, workload.py draws it, device.py names what cpu.py and cuda.py do,
paths.py calls the op, timing.py times it, command.py runs the cells, table.py and plot.py show them.
"""
