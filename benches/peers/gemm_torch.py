"""The peer of `benches/gemm.rs`: a product of matrices in PyTorch. Prints one JSON line.

usage: gemm_torch.py [--size 2048x2048x2048] [--dtype f32|bf16] [--threads 2] [--steps 10]"""
import torch

from common import measure, options

args = options(__doc__, size="2048x2048x2048", dtype="f32")
rows, columns, depth = (int(n) for n in args.size.split("x"))
dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
out = torch.empty(rows, columns, dtype=dtype)
measure(args, lambda: torch.mm(a, b, out=out), case="gemm")
