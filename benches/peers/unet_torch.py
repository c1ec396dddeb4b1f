"""The peer of `benches/unet.rs`: the same 3-D UNet step in PyTorch. Prints one JSON line.

usage: unet_torch.py [--res 64] [--base 16] [--dtype f32|bf16] [--mode eager|compile] [--threads 2] [--steps 5]"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import bf16, measure, options

args = options(__doc__, res=64, base=16, dtype="f32", mode="eager")


class Block(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv3d(cin, cout, 3, padding=1), nn.Conv3d(cout, cout, 3, padding=1)])
        self.norm = nn.ModuleList([nn.InstanceNorm3d(cout, affine=True) for _ in range(2)])

    def forward(self, x):
        for conv, norm in zip(self.conv, self.norm):
            x = F.relu(norm(conv(x)))
        return x


class UNet(nn.Module):
    def __init__(self, base, classes=3, levels=4):
        super().__init__()
        width = [base << level for level in range(levels)]
        self.down = nn.ModuleList([Block(1 if level == 0 else width[level - 1], width[level]) for level in range(levels)])
        self.up = nn.ModuleList([nn.ConvTranspose3d(width[l + 1], width[l], 2, stride=2) for l in range(levels - 1)])
        self.join = nn.ModuleList([Block(2 * width[l], width[l]) for l in range(levels - 1)])
        self.head = nn.Conv3d(base, classes, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([self.up[level](x), skips[level]], 1))
        return self.head(x)


def loss_of(logits, target):
    p = torch.softmax(logits, 1)
    both, total = (p * target).sum((2, 3, 4)), p.sum((2, 3, 4)) + target.sum((2, 3, 4))
    return 1 - ((2 * both + 1) / (total + 1)).mean()


net = UNet(args.base).to(memory_format=torch.channels_last_3d)
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
x = torch.rand(1, 1, args.res, args.res, args.res)
target = F.one_hot((x[:, 0] * 3).long().clamp(max=2), 3).permute(0, 4, 1, 2, 3).float()
x, target = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, target))


forward = torch.compile(net) if args.mode == "compile" else net


def step():
    optimizer.zero_grad(set_to_none=True)
    with bf16(args):
        logits = forward(x)
    loss = loss_of(logits.float(), target)
    loss.backward()
    optimizer.step()
    return loss.item()


measure(args, step, case="unet")
