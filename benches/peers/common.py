"""What the peers share: options, a step that is timed, and the JSON line."""
import argparse
import json
import resource
import statistics
import time

import torch


def options(doc, **defaults):
    """Options of a peer with these defaults, besides `--threads` and `--steps`; sets the threads and the seed."""
    parser = argparse.ArgumentParser(description=doc)
    for name, value in {**defaults, "threads": 2, "steps": 5}.items():
        parser.add_argument("--" + name, type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def bf16(args):
    """Where a forward pass is to run, so that it is in `--dtype bf16`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16")


def measure(args, step, **more):
    """Times a step, after one that is not timed, and prints the line."""
    step()
    seconds = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({**vars(args), "impl": "torch " + torch.__version__, "step_s": statistics.median(seconds),
                      "min_s": min(seconds), "max_s": max(seconds), "peak_mib": peak, **more}))
