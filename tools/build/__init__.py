"""The build of the CUDA library, of the CPU library and of `smoothquant_kernels._kernels`.

plan.py decides (modes, architectures, where things are), sources.py finds what is compiled, commands.py holds the
compilers' flags, ninja.py writes `build.ninja` and runs it, library.py and module.py put these together for CUDA and
cpu.py does for the CPU. install.py copies the results. `python -m tools.build` builds the CPU library in the checkout.
"""
