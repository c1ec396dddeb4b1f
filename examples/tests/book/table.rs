//! What of the book is not run word for word, and why: the only place where that is said.
//!
//! Each block is run by itself, in an empty folder with the files of [`super::place`]. Everything that is not in these
//! tables is run as it stands; an entry that fits nothing fails the test.

/// What stands in the place of other hosts, ports and programs, on every page.
pub const PLACES: &[(&str, &str, &str)] = &[
    ("cargo run --release --bin ", "", "the programs that the tests have built"),
    (" -- ", " ", "of `cargo run`"),
    ("target/release/", "", "the same"),
    ("http://127.0.0.1:7070", "http://127.0.0.1:PORT", "a port that is free"),
    ("127.0.0.1:7070", "127.0.0.1:PORT", "the same"),
    ("0.0.0.0:7070", "127.0.0.1:PORT", "and no other host"),
    ("head:7070", "127.0.0.1:PORT", "this host is the coordinator's"),
    ("HOST:PORT", "127.0.0.1:PORT", "the same"),
    ("127.0.0.1:9090", "127.0.0.1:STATUS", "a port that is free"),
    ("0.0.0.0:9090", "127.0.0.1:STATUS", "and no other host"),
    ("\"$(hostname)\"", "127.0.0.1", "a name that resolves"),
    ("/shared", "$PWD/shared", "a folder for the file system that hosts share"),
    ("/etc/mesh", "certs", "certificates stay where they were made"),
    ("--tls DIR", "--tls certs", "the same"),
];

/// How many of these are about programs: commands are looked up with those in place.
pub const PROGRAMS: usize = 3;

/// How a command is run.
pub enum How {
    /// With these words behind its first two, which make it short.
    With(&'static str),
    /// As this.
    As(&'static str),
    /// So many of it, as on so many hosts.
    Times(usize),
    /// Not.
    Not,
}
use How::*;

/// A small volume that no network is needed for, a small network, two steps.
pub const UNET: &str = "--set data=phantom --set crop=24 --set base=4 --set steps=2";
/// A volume of the size that the CT has, which is only planned.
const PHANTOM: &str = "--set data=phantom";
/// A small encoder, a small text.
pub const BERT: &str = "--set size=config.json --set vocab=vocab.txt --set data=text.txt --set seq=16 --set batch=4 \
                    --set held_out=0.3 --set eval_batches=2 --set steps=4";
const TUNE: &str = "--set seq=16 --set batch=4 --set steps=4 --set held_out=0.3";

/// A command's page (all of them: empty), its beginning, how it is run, and why so. The first one that fits counts.
pub type Rule = (&'static str, &'static str, How, &'static str);

pub const COMMANDS: &[Rule] = &[
    ("README.md", "cargo test", Not, "it is what runs this"),
    ("README.md", "cargo build", Not, "the tests have built the programs"),
    (
        "README.md",
        "unet3d train --resume --steps 300",
        With("--set data=phantom --set crop=24 --set base=4 --set steps=4"),
        "two steps more",
    ),
    ("README.md", "unet3d plan", With(PHANTOM), "the CT is not fetched"),
    (
        "docs/unet3d.md",
        "unet3d train --data scan.nii.gz",
        With("--set size=24 --set base=4 --set steps=2"),
        "a small volume",
    ),
    ("docs/unet3d.md", "unet3d train --config", With("--set steps=2"), "two steps"),
    (
        "docs/unet3d.md",
        "unet3d train --data t1.nii.gz",
        With("--set size=32 --set base=4 --set steps=2 --set memory=64MiB"),
        "a small volume",
    ),
    ("docs/plan.md", "unet3d plan --machine h100x16 --format", With(PHANTOM), "the CT is not fetched"),
    (
        "docs/plan.md",
        "coordinator calibrate mine.toml && unet3d plan",
        As("cp machine.toml mine.toml && unet3d plan --set data=phantom --machine mine.toml --mesh x=2,y=2"),
        "it measures for about a minute, and nothing else should run meanwhile: .ci/run does",
    ),
    (
        "docs/search.md",
        "unet3d plan",
        With("--set size=64 --set base=8"),
        "a small volume; the text below it is of the large one",
    ),
    (
        "docs/search.md",
        "bert plan --size large",
        As("bert plan --size mini --batch 64 --machine h100x4 --layout auto"),
        "plans for 64 devices take a minute, in a debug build",
    ),
    (
        "docs/search.md",
        "bert plan --size 44x",
        As("bert plan --size 4x256x4 --batch 16 --micro-batches 2 --machine h100x4 --layout auto"),
        "the same",
    ),
    (
        "docs/search.md",
        "coordinator calibrate mine.toml && unet3d train",
        As(
            "cp machine.toml mine.toml && unet3d train --set data=phantom --set crop=24 --set base=4 --set steps=2 --machine mine.toml --devices 2 --layout auto",
        ),
        "calibrating takes about a minute: .ci/run does it",
    ),
    ("docs/deploy.md", "docker", Not, "there is no container engine; deploy/check looks through the Dockerfile"),
    (
        "docs/deploy.md",
        "sbatch",
        Not,
        "there is no Slurm; deploy/slurm/test runs the script with stand-ins for its commands",
    ),
    ("docs/deploy.md", "kubectl", Not, "there is no cluster; deploy/check holds the manifests to their schemas"),
    (
        "docs/deploy.md",
        "for role in coordinator worker client",
        As(
            "for role in coordinator worker client; do test -s certs/ca.pem -a -s \"certs/$role.pem\" -a -s \"certs/$role.key\"; done",
        ),
        "there is no cluster; the files that it takes are there",
    ),
    ("docs/deploy.md", "worker --join", Times(4), "as on four hosts"),
    ("docs/security.md", "worker --join", Times(4), "as on four hosts"),
    (
        "docs/observability.md",
        "coordinator watch",
        As("timeout 1 coordinator watch 127.0.0.1:PORT || [[ $? == 124 ]]"),
        "it watches until it is stopped",
    ),
    (
        "docs/observability.md",
        "coordinator drain",
        As(
            "coordinator drain 127.0.0.1:PORT 1 && until coordinator status 127.0.0.1:PORT | grep -q '0 workers'; do sleep 0.1; done",
        ),
        "the worker's number; and it is gone then",
    ),
    (
        "docs/plan.md",
        "bert plan --size base",
        As("bert plan --size base --machine a100x8 --mesh data=2,model=4"),
        "plans for 64 devices take half a minute, in a debug build",
    ),
    (
        "docs/bert.md",
        "bert finetune --out runs/films ",
        With("--set seq=16 --set batch=4 --set steps=4 --set held_out=0.3 --from bert-hf --data films.tsv"),
        "MiniLM and the reviews are not fetched",
    ),
    (
        "docs/bert.md",
        "bert finetune --from none",
        With(
            "--set seq=16 --set batch=4 --set steps=4 --set held_out=0.3 --set size=config.json --set vocab=vocab.txt --data films.tsv",
        ),
        "the reviews are not fetched",
    ),
    ("docs/huggingface.md", "bert embed --file", With("--from bert-hf"), "MiniLM is not fetched"),
    ("", "coordinator &", As("coordinator --listen 127.0.0.1:PORT"), "a port that is free"),
    ("", "coordinator --status", As("coordinator --listen 127.0.0.1:PORT --status 127.0.0.1:STATUS"), "the same"),
    ("", "unet3d train", With(UNET), "a small volume, a small network, two steps"),
    ("", "bert pretrain", With(BERT), "a small text, a small network, four steps"),
    ("", "bert finetune", With(TUNE), "four steps"),
];

/// What has to be there before a block, by its page and first line.
pub const BEFORE: &[(&str, &str, &str)] = &[
    ("README.md", "unet3d train --mesh x=2,y=2,z=2", "unet3d train $UNET"),
    (
        "docs/bert.md",
        "cargo run --release --bin bert -- compare",
        "for run in a b c d; do bert pretrain $BERT --out runs/$run; done",
    ),
    (
        "docs/bert.md",
        "cargo run --release --bin bert -- finetune",
        "bert pretrain $BERT --out runs/bert && bert export --out runs/bert --to bert-hf",
    ),
    ("docs/huggingface.md", "cargo run --release --bin bert -- export", "bert pretrain $BERT --out runs/bert"),
    ("docs/deploy.md", "# on head", "coordinator certs init certs; mkdir shared"),
    (
        "docs/observability.md",
        "coordinator status HOST:PORT",
        "coordinator --listen 127.0.0.1:PORT\nworker --join 127.0.0.1:PORT\nuntil coordinator status 127.0.0.1:PORT | grep -q '1 worker'; do sleep 0.1; done",
    ),
    ("docs/security.md", "coordinator certs add", "coordinator certs init certs"),
];

/// What has to be so after a block.
pub const AFTER: &[(&str, &str, &str)] = &[
    // The README says that these are equal.
    (
        "README.md",
        "unet3d train --mesh x=2,y=2,z=2",
        "same() { tail -n 1 \"$1\" | grep -o '\"variables_hash\":\"[^\"]*\"'; }\n\
      test \"$(same runs/eight/metrics.jsonl)\" = \"$(same runs/uneven/metrics.jsonl)\"\n\
      test \"$(same runs/eight/metrics.jsonl)\" = \"$(same runs/processes/metrics.jsonl)\"",
    ),
];

/// How a block that is no script is held to what it says.
pub enum Shown {
    /// That test holds it to it.
    By(&'static str),
    /// This prints its lines, but for numbers; `..` stands for anything, and so do these words of it.
    Printed(&'static str, &'static [&'static str]),
    /// A mesh and a layout; this plans them, as `$MESH` and `$LAYOUT`.
    Layout(&'static str),
    /// A configuration, as the file `block.toml`; this reads it.
    Config(&'static str),
    /// Files, each in a line; this makes them below `made`.
    Files(&'static str),
    /// Nothing here can; why.
    Not(&'static str),
}
use Shown::{By, Config, Files, Layout, Printed};

/// Blocks by page, kind and beginning.
pub const SHOWN: &[(&str, &str, &str, Shown)] = &[
    ("docs/concepts.md", "text", "device 0", By("examples/tests/book/code.rs")),
    ("docs/errors.md", "text", "", By("mesh/tests/lints.rs")),
    ("docs/layouts.md", "layout", "mesh", By("coordinator/tests/parallelisms.rs")),
    ("docs/layouts.md", "toml", "mesh =", By("mesh/tests/layouts.rs")),
    ("docs/layouts.md", "toml", "# bert pretrain", Config("bert plan $BERT --mesh data=2,model=2 --layout block.toml")),
    (
        "docs/layouts.md",
        "text",
        "mesh    pipe=2",
        Layout("bert plan $BERT --mesh \"$MESH\" --layout \"$LAYOUT\" --micro-batches 2"),
    ),
    (
        "docs/layouts.md",
        "text",
        "error[L0003]",
        Printed("! unet3d plan --data phantom --layout chanel:x\n! unet3d plan --data phantom --mesh x=9", &[]),
    ),
    (
        "docs/model-programs.md",
        "text",
        "error[U0008]",
        Printed("! bert pretrain $BERT --rate 1e30 --set clip=0 --set warmup=1 --set checkpoint_every=1", &[]),
    ),
    (
        "docs/observability.md",
        "text",
        "a device of 2",
        // Which steps take longest is chance.
        Printed(
            "unet3d train $UNET --set steps=4 --mesh x=2 --threads 1 --profile",
            &[
                "conv_weight_grad  decoder.0/conv.0",
                "conv              decoder.0/conv.0",
                "conv_transpose    decoder.0/conv.0",
                "k.x:3 k.y:3",
                "batch:1 x:61",
            ],
        ),
    ),
    ("docs/observability.md", "text", "worker 3 is lost", By("examples/tests/observability.rs")),
    ("docs/plan.md", "text", "warning[L0501]", Printed("unet3d plan --data phantom --mesh x=3", &[])),
    ("docs/processes.md", "toml", "", Config("coordinator certs init certs\ncoordinator --config block.toml")),
    ("docs/recovery.md", "text", "checkpoints/", Files("unet3d train $UNET --out made")),
    (
        "docs/search.md",
        "text",
        "search ",
        Printed(
            "unet3d plan --size 512 --base 32 --dtype bf16 --machine h100x8 --layout auto",
            &["193.7 ms, planned in 752.8 ms"],
        ),
    ),
    ("docs/security.md", "text", "WARN audit", By("coordinator/tests/access.rs")),
    ("docs/unet3d.md", "text", "memory ", Printed("unet3d plan --data phantom --memory 100MiB", &[])),
    (
        "docs/huggingface.md",
        "python",
        "from transformers",
        Shown::Not("transformers is not here; examples/tests/huggingface.rs compares with values that it gave"),
    ),
];
