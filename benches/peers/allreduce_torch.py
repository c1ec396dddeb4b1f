"""The peer of `benches/transport.rs`: an all-reduce between processes in PyTorch (gloo). Prints one JSON line.

usage: allreduce_torch.py [--reduce-mib 16] [--devices 4] [--repeat 36]"""
import argparse
import json
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def device(me, args, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=me, world_size=args.devices)
    elements = (args.reduce_mib << 20) // 4
    x = torch.arange(elements, dtype=torch.float32) % 1000
    seconds = []
    for i in range(args.repeat + 3):
        y = x.clone()
        begun = time.perf_counter()
        dist.all_reduce(y)
        if i >= 3:
            seconds.append(time.perf_counter() - begun)
    assert torch.equal(y, x * args.devices)
    if me == 0:
        step = statistics.median(seconds)
        sent = 2 * (args.devices - 1) / args.devices * elements * 4
        print(json.dumps({"case": "allreduce", "impl": "torch-gloo", "devices": args.devices, "bytes": elements * 4,
                          "step_s": step, "min_s": min(seconds), "bus_gb_s": sent / step / 1e9}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reduce-mib", type=int, default=16)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=36)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(device, (args, port), nprocs=args.devices)
