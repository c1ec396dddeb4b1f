"""Runs our benches and PyTorch's in turn, and prints how many times as fast ours are.

usage: compare.py [--pairs 5] [--only TEXT] [--python python3]       the table of all cases, or of those with TEXT in their names
       compare.py [--pairs 5] --ours "COMMAND" --peer "COMMAND" ...  any two that print a JSON line with `step_s`; of several
                                                                     peers the fastest counts

    compare.py --only bert
    compare.py --ours "cargo bench -q --bench transport -- --transport ring --case allreduce" \\
               --peer "python3 benches/peers/allreduce_torch.py"
"""
import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=5)
parser.add_argument("--only", default="")
parser.add_argument("--python", default=sys.executable, help="one that has torch")
parser.add_argument("--ours")
parser.add_argument("--peer", action="append", default=[])
args = parser.parse_args()
if bool(args.ours) != bool(args.peer):
    parser.error("--ours and --peer go together")
here = pathlib.Path(__file__).parent


def case(name, bench, peer, options, modes=("",)):
    """A bench and a peer that take the same options; `modes` are those of the peer that are tried."""
    ours = f"cargo bench -q --bench {bench} -- {options}"
    return name, ours, [f"{args.python} {here}/{peer}_torch.py {options} {mode}".strip() for mode in modes]


def cases():
    for size, threads in (("1024x1024x1024", 1), ("2048x2048x2048", 1), ("4096x1024x256", 2), ("640x30522x256", 2)):
        for dtype in ("f32", "bf16"):
            options = f"--size {size} --dtype {dtype} --threads {threads}"
            yield case(f"gemm {size} {dtype}, {threads} threads", "gemm", "gemm", options)
    for channels, size in ((16, 96), (32, 64), (64, 32)):
        for what in ("forward", "both"):
            for dtype in ("f32", "bf16"):
                options = f"--channels {channels} --size {size} --what {what} --dtype {dtype} --threads 2"
                yield case(f"conv {channels} channels, {size}³, {what}, {dtype}", "conv", "conv", options)
    modes = ("--mode eager", "--mode compile")
    for res in (64, 128):
        for dtype in ("f32", "bf16"):
            options = f"--res {res} --dtype {dtype} --threads 2"
            yield case(f"unet {res}³, 16 filters, {dtype}", "unet", "unet", options, modes)
    for size in ("mini", "base"):
        for dtype in ("f32", "bf16"):
            yield case(f"bert-{size}, {dtype}", "bert", "bert", f"--size {size} --dtype {dtype} --threads 2", modes)


def run(command):
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def peak(line):
    """Of all devices, where a line has a list of them."""
    mib = line.get("peak_mib", 0)
    return sum(mib) if isinstance(mib, list) else mib


def compare(ours, peers):
    """Pairs of our line and the fastest peer's."""
    for _ in range(args.pairs):
        lines = [run(peer) for peer in peers]
        yield run(ours), min(lines, key=lambda line: line["step_s"])


single = args.ours and [("", args.ours, args.peer)]
print("| case | ours | PyTorch | times as fast | from, to | memory, ours/PyTorch |\n|---|---|---|---|---|---|", flush=True)
for name, ours, peers in single or cases():
    if args.only in name:
        pairs = list(compare(ours, peers))
        ratios = [peer["step_s"] / own["step_s"] for own, peer in pairs]
        mine, theirs = (statistics.median(line["step_s"] for line in side) for side in zip(*pairs))
        own, peer = pairs[-1]
        memory = f"{peak(own)}/{peak(peer)} MiB" if peak(own) and peak(peer) else ""
        print(f"| {name or own.get('case', '')} | {mine:.4f} s | {theirs:.4f} s | {statistics.median(ratios):.2f} "
              f"| {min(ratios):.2f}, {max(ratios):.2f} | {memory} |", flush=True)
