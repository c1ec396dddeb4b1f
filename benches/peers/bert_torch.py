"""The peer of `benches/bert.rs`: the same step of BERT on masked words in PyTorch. Prints one JSON line.

usage: bert_torch.py [--size mini|base] [--dtype f32|bf16] [--mode eager|compile] [--threads 2] [--steps 5]"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import bf16, measure, options

args = options(__doc__, size="mini", dtype="f32", mode="eager")
VOCAB, SEQ, PREDICTIONS = 30522, 128, 20
LAYERS, WIDTH, HEADS, BATCH = {"mini": (4, 256, 4, 32), "base": (12, 768, 12, 8)}[args.size]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.output, self.attention_norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).view(BATCH, SEQ, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(BATCH, SEQ, WIDTH)
        x = self.attention_norm(x + self.output(seen))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.positions, self.segments = nn.Embedding(VOCAB, WIDTH), nn.Embedding(512, WIDTH), nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.transform, self.transform_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, words, segments, positions, targets):
        x = self.norm(self.words(words) + self.positions.weight[:SEQ] + self.segments(segments))
        for layer in self.layers:
            x = layer(x)
        x = x.gather(1, positions[:, :, None].expand(-1, -1, WIDTH))
        x = self.transform_norm(F.gelu(self.transform(x)))
        return F.cross_entropy(F.linear(x, self.words.weight, self.bias).flatten(0, 1), targets.flatten())


net = Bert()
optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.01, fused=True)
forward = torch.compile(net) if args.mode == "compile" else net
words = torch.randint(VOCAB, (BATCH, SEQ))
segments = (torch.arange(SEQ) >= SEQ // 2).long().expand(BATCH, SEQ).contiguous()
positions = torch.rand(BATCH, SEQ).argsort(1)[:, :PREDICTIONS].contiguous()
targets = torch.randint(VOCAB, (BATCH, PREDICTIONS))


def step():
    optimizer.zero_grad(set_to_none=True)
    with bf16(args):
        loss = forward(words, segments, positions, targets)
    loss.backward()
    optimizer.step()
    return loss.item()


measure(args, step, case="bert-" + args.size)
