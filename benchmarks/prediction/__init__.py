"""The expected time of a GEMM by the dispatch's own arithmetic (csrc/gemm/cost.cpp), and measured times beside it."""
