"""The peer of `benches/conv.rs`: a 3x3x3 convolution in PyTorch, channels last. Prints one JSON line.

usage: conv_torch.py [--channels 16] [--size 96] [--dtype f32|bf16] [--what forward|both] [--threads 2] [--steps 5]"""
import torch
import torch.nn.functional as F

from common import measure, options

args = options(__doc__, channels=16, size=96, dtype="f32", what="forward")
dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
n, c = args.size, args.channels


def last(*shape):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


x, w, g = last(1, c, n, n, n).requires_grad_(), last(c, c, 3, 3, 3).requires_grad_(), last(1, c, n, n, n)
b = torch.zeros(c, dtype=dtype, requires_grad=True)


def forward():
    with torch.no_grad():
        F.conv3d(x, w, b, padding=1)


def both():
    x.grad = w.grad = b.grad = None
    F.conv3d(x, w, b, padding=1).backward(g)


measure(args, forward if args.what == "forward" else both, case="conv")
