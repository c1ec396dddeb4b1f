"""Alternates two commands that each print a JSON line with `step_s`, and prints the ratios of their times.

usage: compare.py [--pairs 5] --ours "COMMAND" --peer "COMMAND"

    compare.py --ours "cargo bench -q -p benches --bench unet -- --threads 2" \\
               --peer "python3 benches/peers/unet_torch.py --threads 2"
    compare.py --ours "cargo bench -q -p benches --bench transport -- --transport ring --case allreduce" \\
               --peer "python3 benches/peers/allreduce_torch.py"
"""
import argparse
import json
import shlex
import statistics
import subprocess

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pairs", type=int, default=5)
parser.add_argument("--ours", required=True)
parser.add_argument("--peer", required=True)
args = parser.parse_args()


def seconds(command):
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])["step_s"]


ratios = []
for pair in range(args.pairs):
    peer, ours = seconds(args.peer), seconds(args.ours)
    ratios.append(ours / peer)
    print(f"pair {pair + 1}: peer {peer:.4f} s, ours {ours:.4f} s, ours/peer {ratios[-1]:.3f}", flush=True)
print(f"ours/peer: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
