#!/usr/bin/env python3
"""Steps as a machine description predicts them, beside steps as they are, for layouts of the UNet and of BERT-mini.

    cargo run --release --bin coordinator -- calibrate machine.toml
    python3 benches/predicted.py machine.toml

None of these networks or sizes is one that `calibrate` measures. Prints the layouts, both times, and the rank correlation
of each network. Ends with 1 if a layout is off by more than 15 %, or a correlation is below 0.9.
"""
import json
import statistics
import subprocess
import sys

# The deep levels whole on every device: those differ by more than steps of one layout do.
DEEP = ",".join(["x:x", *(f"{level}/**{{x:none}}" for level in ["encoder.2", "encoder.3", "decoder.2"])])
UNET = [
    ("1", ""),
    ("x=2", "x:x"),
    ("y=2", "y:y"),
    ("x=2,y=2", "x:x,y:y"),
    ("x=4", "x:x"),
    ("x=2,y=2,z=2", "x:x,y:y,z:z"),
    ("x=2", DEEP),
    ("x=4", DEEP),
    ("x=8", DEEP),
]
BERT = [
    ("1", ""),
    ("data=2", "batch:data"),
    ("data=4", "batch:data"),
    ("model=2", "heads:model,d_ff:model,vocab:model"),
    ("data=8", "batch:data"),
    ("model=4", "heads:model,d_ff:model,vocab:model"),
    ("data=2,model=2", "batch:data,heads:model,d_ff:model,vocab:model"),
    ("data=2,model=4", "batch:data,heads:model,d_ff:model,vocab:model"),
    ("data=2,seq=2", "batch:data,seq:seq"),
]
ROUNDS = 5


def step(bench, machine, mesh, layout):
    command = ["cargo", "bench", "-q", "--bench", bench, "--", "--machine", machine, "--mesh", mesh]
    command += ["--layout", layout] if layout else []
    line = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[0])
    return line["step_s"], line["predicted_s"]


def ranks(values):
    return [sorted(values).index(v) for v in values]


def main():
    good = True
    for bench, layouts in [("unet", UNET), ("bert", BERT)]:
        rows = [[] for _ in layouts]
        # Rounds go over all layouts, so that what disturbs the machine for a while does not hit one of them alone.
        for _ in range(ROUNDS):
            for row, (mesh, layout) in zip(rows, layouts):
                row.append(step(bench, sys.argv[1], mesh, layout))
        measured = [statistics.median(m for m, _ in row) for row in rows]
        predicted = [row[0][1] for row in rows]
        for (mesh, layout), m, p in zip(layouts, measured, predicted):
            good &= abs(p / m - 1) <= 0.15
            print(f"{bench:5} {mesh:16} {layout:64} {m * 1e3:8.1f} ms  predicted {p * 1e3:8.1f} ms  {100 * (p / m - 1):+5.1f} %")
        correlation = statistics.correlation(ranks(measured), ranks(predicted))
        good &= correlation >= 0.9
        print(f"{bench:5} rank correlation {correlation:.2f}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
