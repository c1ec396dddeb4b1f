//! Hugging Face's folders in and out: config.json, safetensors, and the vocabulary beside them.
//!
//! One table ([`MODULES`]) says which of their modules is which of ours; it serves both directions. Their dense layers
//! are stored `[out, in]`, with all heads in one dimension; ours are `[in.., out..]`, with a dimension for heads.

use super::architecture::Architecture;
use crate::run::Failed;
use coordinator::{Failure, Session};
use mesh::array::Array;
use mesh::program::Program;
use ndarray::ArrayD;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use worker::data::DataError;
use worker::data::weights::{self, Weights};

/// The file that describes a model.
pub const CONFIG: &str = "config.json";
const CONFIG_BYTES: u64 = 1 << 20;
/// Faults that one message lists at the most.
const LISTED: usize = 30;

/// What is wrong with a model, or with the place for one.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// A config.json of a model that this is not.
    #[error("H0001: {}: {what}\n  help: {help}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What there is.
        help: String,
    },
    /// Tensors that are not those of the program.
    #[error("H0002: the weights in {} do not fit the program:{}\n  help: {help}", folder.display(), listed(faults))]
    Tensors {
        /// The folder.
        folder: PathBuf,
        /// A line each.
        faults: Vec<String>,
        /// What to do.
        help: String,
    },
    /// A folder that is not overwritten.
    #[error("H0003: {} is there already\n  help: name a folder that is not there yet, or remove it", folder.display())]
    Occupied {
        /// The folder.
        folder: PathBuf,
    },
    /// Files.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The session.
    #[error(transparent)]
    Session(#[from] Failure),
}

impl From<HfError> for Failed {
    fn from(e: HfError) -> Failed {
        match e {
            HfError::Data(e) => e.into(),
            HfError::Session(e) => e.into(),
            HfError::Occupied { .. } => Failed::Own { error: e.into(), exit_code: 2 },
            HfError::Config { .. } | HfError::Tensors { .. } => Failed::Own { error: e.into(), exit_code: 3 },
        }
    }
}

fn listed(faults: &[String]) -> String {
    let mut text: String = faults.iter().take(LISTED).map(|f| format!("\n  - {f}")).collect();
    if faults.len() > LISTED {
        text += &format!("\n  - and {} more", faults.len() - LISTED);
    }
    text
}

fn unwritable(path: &Path, why: std::io::Error) -> HfError {
    DataError::File { what: "write", path: path.into(), why: why.to_string() }.into()
}

/// A config.json: the architecture, and what else it says, which an export says again.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Sizes.
    pub architecture: Architecture,
    others: Map<String, Value>,
}

impl From<Architecture> for Config {
    fn from(architecture: Architecture) -> Config {
        Config { architecture, others: Map::new() }
    }
}

impl Config {
    /// Reads a config.json.
    ///
    /// # Errors
    /// A file that cannot be read; one of a model that is no BERT, or of a kind of BERT that this is not.
    pub fn read(path: &Path) -> Result<Config, HfError> {
        let failed = |e: std::io::Error| DataError::File { what: "read", path: path.into(), why: e.to_string() };
        let mut text = String::new();
        let open = fs::File::open(path).map_err(failed)?;
        open.take(CONFIG_BYTES).read_to_string(&mut text).map_err(failed)?;
        let all: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| DataError::Format { path: path.into(), why: format!("it is no JSON object: {e}") })?;
        Config::from_map(all).map_err(|(what, help)| HfError::Config { path: path.into(), what, help })
    }

    /// What is wrong, and what to do.
    fn from_map(mut all: Map<String, Value>) -> Result<Config, (String, String)> {
        // What is null is as if it were not there.
        all.retain(|_, v| !v.is_null());
        let supported: [(&str, &[Value]); 6] = [
            ("model_type", &["bert".into()]),
            ("position_embedding_type", &["absolute".into()]),
            ("is_decoder", &[false.into()]),
            ("add_cross_attention", &[false.into()]),
            ("tie_word_embeddings", &[true.into()]),
            ("hidden_act", &["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"].map(Value::from)),
        ];
        for (key, values) in supported {
            if let Some(v) = all.get(key).filter(|v| !values.contains(v)) {
                let list: Vec<String> = values.iter().map(Value::to_string).collect();
                return Err((format!("`{key}` is {v}"), format!("supported: {}", list.join(", "))));
            }
        }
        let architecture: Architecture = serde_json::from_value(Value::Object(all.clone()))
            .map_err(|e| (e.to_string(), "see BertConfig for the keys' types".to_string()))?;
        let a = &architecture;
        let sizes = [
            ("vocab_size", a.vocab_size, 1 << 24),
            ("hidden_size", a.hidden_size, 1 << 20),
            ("num_hidden_layers", a.num_hidden_layers, 1 << 12),
            ("num_attention_heads", a.num_attention_heads, 1 << 16),
            ("intermediate_size", a.intermediate_size, 1 << 22),
            ("max_position_embeddings", a.max_position_embeddings, 1 << 24),
            ("type_vocab_size", a.type_vocab_size, 1 << 16),
        ];
        if let Some((key, size, most)) = sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size)) {
            return Err((format!("`{key}` is {size}"), format!("it goes from 1 to {most}")));
        }
        if !a.hidden_size.is_multiple_of(a.num_attention_heads) {
            let what = format!("{} heads cannot share out a `hidden_size` of {}", a.num_attention_heads, a.hidden_size);
            return Err((what, "make `num_attention_heads` a divisor of it".into()));
        }
        let shares = [a.hidden_dropout_prob, a.attention_probs_dropout_prob];
        if !(shares.iter().all(|s| (0.0..1.0).contains(s)) && a.layer_norm_eps >= 0.0 && a.initializer_range >= 0.0) {
            let what = "a drop-out is no share, or `layer_norm_eps` or `initializer_range` is negative".into();
            return Err((what, "drop-outs go from 0 to below 1, the others from 0 on".into()));
        }
        Ok(Config { architecture, others: all })
    }

    /// The text of the file, for a model of that class of transformers.
    fn text(&self, class: &str) -> String {
        // By way of text: an f32 then has the digits that it was written with.
        let own = serde_json::to_string(&self.architecture).expect("numbers and texts");
        let own: Map<String, Value> = serde_json::from_str(&own).expect("an object");
        let mut all = self.others.clone();
        all.extend(own);
        all.insert("architectures".into(), vec![class].into());
        for key in ["dtype", "torch_dtype"] {
            if all.contains_key(key) {
                all.insert(key.into(), "float32".into());
            }
        }
        serde_json::to_string_pretty(&all).expect("keys are texts") + "\n"
    }
}

/// What a module has.
#[derive(Clone, Copy)]
enum Module {
    /// `table`.
    Embedding,
    /// `scale` and `bias`.
    Norm,
    /// `kernel`, with so many dimensions that are summed over, and `bias`.
    Dense(usize),
    /// Itself a vector.
    Vector,
}

/// Ours and theirs, without their prefix `bert.`; `{}` is a layer.
const MODULES: [(&str, &str, Module); 18] = [
    ("embeddings/word", "embeddings.word_embeddings", Module::Embedding),
    ("embeddings/position", "embeddings.position_embeddings", Module::Embedding),
    ("embeddings/segment", "embeddings.token_type_embeddings", Module::Embedding),
    ("embeddings/norm", "embeddings.LayerNorm", Module::Norm),
    ("encoder/layer.{}/attention/query", "encoder.layer.{}.attention.self.query", Module::Dense(1)),
    ("encoder/layer.{}/attention/key", "encoder.layer.{}.attention.self.key", Module::Dense(1)),
    ("encoder/layer.{}/attention/value", "encoder.layer.{}.attention.self.value", Module::Dense(1)),
    ("encoder/layer.{}/attention/output", "encoder.layer.{}.attention.output.dense", Module::Dense(2)),
    ("encoder/layer.{}/attention_norm", "encoder.layer.{}.attention.output.LayerNorm", Module::Norm),
    ("encoder/layer.{}/up", "encoder.layer.{}.intermediate.dense", Module::Dense(1)),
    ("encoder/layer.{}/down", "encoder.layer.{}.output.dense", Module::Dense(1)),
    ("encoder/layer.{}/norm", "encoder.layer.{}.output.LayerNorm", Module::Norm),
    ("pooler", "pooler.dense", Module::Dense(1)),
    ("masked_words/transform", "cls.predictions.transform.dense", Module::Dense(1)),
    ("masked_words/norm", "cls.predictions.transform.LayerNorm", Module::Norm),
    ("masked_words/bias", "cls.predictions.bias", Module::Vector),
    ("next_sentence", "cls.seq_relationship", Module::Dense(1)),
    ("classifier/head", "classifier", Module::Dense(1)),
];

/// What judges sentences: as wide as a task has classes.
const CLASSIFIER: &str = "classifier/";

/// In files, and of no use: positions by number, and the decoder, which is tied to the word embeddings and the bias.
const HARMLESS: [&str; 3] =
    ["embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"];

/// How a tensor of theirs becomes one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As it is.
    Same,
    /// Its dimensions in one.
    Flat,
    /// `[out, in]` for ours, of which so many dimensions are summed over and come first.
    Kernel(usize),
}

impl Form {
    /// The shape of theirs.
    fn shape(self, ours: &[usize]) -> Vec<usize> {
        match self {
            Form::Same => ours.into(),
            Form::Flat => vec![ours.iter().product()],
            Form::Kernel(over) => vec![ours[over..].iter().product(), ours[..over].iter().product()],
        }
    }

    /// Ours, of that shape; theirs has the shape that belongs to it.
    fn import(self, theirs: ArrayD<f32>, ours: &[usize]) -> ArrayD<f32> {
        match self {
            Form::Same => theirs,
            Form::Flat => theirs.into_shape_with_order(ours).expect("the same elements"),
            Form::Kernel(_) => turned(theirs).into_shape_with_order(ours).expect("the same elements"),
        }
    }

    fn export(self, ours: ArrayD<f32>) -> ArrayD<f32> {
        let shape = self.shape(ours.shape());
        match self {
            Form::Same => ours,
            Form::Flat => ours.into_shape_with_order(shape).expect("the same elements"),
            Form::Kernel(_) => turned(ours.into_shape_with_order(vec![shape[1], shape[0]]).expect("the same elements")),
        }
    }
}

fn turned(mut a: ArrayD<f32>) -> ArrayD<f32> {
    a.swap_axes(0, 1);
    a.as_standard_layout().into_owned()
}

/// A line of the table for one tensor.
struct Pair {
    ours: String,
    theirs: String,
    form: Form,
}

impl Pair {
    /// Whether a model may do without: all behind the encoder.
    fn of_head(&self) -> bool {
        !self.theirs.starts_with("embeddings.") && !self.theirs.starts_with("encoder.")
    }
}

/// The table for an architecture.
fn pairs(architecture: &Architecture) -> Vec<Pair> {
    let mut all = vec![];
    for (ours, theirs, module) in MODULES {
        let parameters: &[(&str, &str, Form)] = match module {
            Module::Embedding => &[("/table", ".weight", Form::Same)],
            Module::Norm => &[("/scale", ".weight", Form::Flat), ("/bias", ".bias", Form::Flat)],
            Module::Dense(over) => &[("/kernel", ".weight", Form::Kernel(over)), ("/bias", ".bias", Form::Flat)],
            Module::Vector => &[("", "", Form::Flat)],
        };
        let layers = if ours.contains("{}") { architecture.num_hidden_layers } else { 1 };
        for layer in (0..layers).map(|l| l.to_string()) {
            all.extend(parameters.iter().map(|(our_end, their_end, form)| Pair {
                ours: ours.replace("{}", &layer) + our_end,
                theirs: theirs.replace("{}", &layer) + their_end,
                form: *form,
            }));
        }
    }
    all
}

/// A name without what files differ in: the prefix of models with heads, and what norms' parts were called in old files.
fn plain(name: &str) -> String {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    match (name.strip_suffix("LayerNorm.gamma"), name.strip_suffix("LayerNorm.beta")) {
        (Some(norm), _) => format!("{norm}LayerNorm.weight"),
        (_, Some(norm)) => format!("{norm}LayerNorm.bias"),
        _ => name.into(),
    }
}

/// A model in a folder: its config is read, and of its weights which there are.
pub struct Model {
    /// Its config.json.
    pub config: Config,
    weights: Weights,
}

/// Where a program's variables come from.
pub struct Fit {
    /// Name in the file, and the variable's.
    tensors: Vec<(String, String, Form)>,
    /// What the user should know: tensors that are not used, variables that keep their start.
    pub notes: Vec<String>,
}

impl Model {
    /// Opens a folder with config.json and model.safetensors, or shards of it.
    ///
    /// # Errors
    /// Files that are missing or damaged; a model that is not supported.
    pub fn open(folder: &Path) -> Result<Model, HfError> {
        Ok(Model { config: Config::read(&folder.join(CONFIG))?, weights: Weights::open(folder)? })
    }

    /// Finds a tensor for each variable of a program but optimizer slots and other state, before any is loaded. With
    /// `heads_may_lack` the variables of heads that the file does not have keep their start, and those of a classifier
    /// that the file has for another number of classes.
    ///
    /// # Errors
    /// All tensors that are missing, unknown, or of another shape or type, by name.
    pub fn check(&self, program: &Program, heads_may_lack: bool) -> Result<Fit, HfError> {
        let (mut fit, mut faults) = (Fit { tensors: vec![], notes: vec![] }, vec![]);
        let mut stored: BTreeMap<String, &String> = BTreeMap::new();
        for name in self.weights.tensors().keys() {
            if let Some(other) = stored.insert(plain(name), name) {
                faults.push(format!("twice: `{name}` is `{other}`"));
            }
        }
        let mut known = vec![];
        for pair in pairs(&self.config.architecture) {
            let variable = program.variables.iter().find(|v| *v.name == *pair.ours);
            let found = stored.remove(&pair.theirs);
            known.push(pair.ours.clone());
            match (variable, found) {
                (Some(v), Some(name)) => {
                    let (t, wanted) = (&self.weights.tensors()[name], pair.form.shape(&v.ty.shape()));
                    let as_wide = t.shape.get(1..) == wanted.get(1..);
                    if t.shape != wanted && as_wide && heads_may_lack && pair.ours.starts_with(CLASSIFIER) {
                        fit.notes.push(format!("`{}` keeps its start: `{name}` is for other classes", pair.ours));
                        continue;
                    }
                    if t.shape != wanted {
                        faults.push(format!("mis-shaped: `{name}` is {:?}; `{}` takes {wanted:?}", t.shape, pair.ours));
                    } else if !matches!(t.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                        faults.push(format!("mis-typed: `{name}` is {:?}; F32, F16 and BF16 are read", t.dtype));
                    }
                    fit.tensors.push((name.clone(), pair.ours, pair.form));
                }
                (Some(_), None) if heads_may_lack && pair.of_head() => {
                    fit.notes.push(format!("`{}` keeps its start: the file has no `{}`", pair.ours, pair.theirs));
                }
                (Some(_), None) => faults.push(format!("missing: `{}`, for `{}`", pair.theirs, pair.ours)),
                (None, Some(name)) if pair.of_head() => {
                    fit.notes.push(format!("`{name}` is not used: the program has no `{}`", pair.ours));
                }
                (None, Some(name)) => faults.push(format!("extra: `{name}`; the program has no `{}`", pair.ours)),
                (None, None) => {}
            }
        }
        for (name, actual) in stored {
            if HARMLESS.contains(&&*name) {
                fit.notes.push(format!("`{actual}` is not used: it follows from other tensors"));
            } else {
                faults.push(format!("extra: `{actual}` is no tensor of a BERT of {CONFIG}'s sizes"));
            }
        }
        // Slots lie below their variable; what is trained and in no line of the table would silently keep its start.
        for v in program.variables.iter().filter(|v| v.trainable && !known.iter().any(|k| **k == *v.name)) {
            faults.push(format!("missing: no tensor is known for the variable `{}`", v.name));
        }
        if faults.is_empty() {
            return Ok(fit);
        }
        let help = format!(
            "give the folder of a BERT whose weights are those of its {CONFIG}; positions, vocabulary and layers are \
             taken as they are, not extended, and layers that share weights cannot start from it"
        );
        Err(HfError::Tensors { folder: self.weights.folder().into(), faults, help })
    }

    /// Sets a session's variables, one after the other; `progress` is told how many are set of how many.
    ///
    /// # Errors
    /// A file that cannot be read; a session that is lost.
    pub fn load(
        &self,
        session: &mut Session,
        fit: &Fit,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(), HfError> {
        for (i, (name, ours, form)) in fit.tensors.iter().enumerate() {
            let Array::F32(theirs) = self.weights.read(name)? else { continue };
            let shape = session.program().variables.iter().find(|v| *v.name == **ours).map(|v| v.ty.shape());
            // Without the variable, `set_variable` says so.
            let shape = shape.unwrap_or_else(|| theirs.shape().into());
            session.set_variable(ours, &Array::F32(form.import(theirs, &shape)))?;
            progress(i + 1, fit.tensors.len());
        }
        Ok(())
    }
}

/// What an export writes beside the weights, and how.
pub struct Export<'a> {
    /// The config.
    pub config: &'a Config,
    /// vocab.txt, tokenizer.json: copied.
    pub vocabulary: &'a [PathBuf],
    /// What the classes of a classifier are called, in their order; empty: `LABEL_0` and so on.
    pub classes: &'a [String],
    /// Bytes of a file of weights at the most; None: one file.
    pub shard_bytes: Option<u64>,
    /// The path of the variable that a layer uses, from that of the model's text: another one where layers share.
    pub path: &'a dyn Fn(&str) -> String,
}

/// Writes a session's variables as a folder that transformers opens, and gives the class of it that fits them. The folder
/// is there whole or not at all.
///
/// # Errors
/// A folder that is there already; files that cannot be written; a session that has no encoder, or is lost.
pub fn export(session: &Session, out: &Path, options: &Export) -> Result<&'static str, HfError> {
    if out.exists() && fs::read_dir(out).map_or(true, |mut entries| entries.next().is_some()) {
        return Err(HfError::Occupied { folder: out.into() });
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| unwritable(parent, e))?;
    let name = out.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
    let staging = parent.join(format!(".{name}-{}", std::process::id()));
    let written = fs::create_dir(&staging).map_err(|e| unwritable(&staging, e)).and_then(|()| {
        let class = write(session, &staging, options)?;
        fs::rename(&staging, out).map_err(|e| unwritable(out, e))?;
        Ok(class)
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&staging);
    }
    written
}

fn write(session: &Session, folder: &Path, options: &Export) -> Result<&'static str, HfError> {
    let variables = &session.program().variables;
    let (mut found, mut faults) = (vec![], vec![]);
    for pair in pairs(&options.config.architecture) {
        let path = (options.path)(&pair.ours);
        match variables.iter().find(|v| *v.name == *path) {
            Some(v) => found.push((pair, v)),
            None if pair.of_head() => {}
            None => faults.push(format!("missing: the program has no variable `{path}`")),
        }
    }
    if !faults.is_empty() {
        let help = "export a program with the whole encoder".into();
        return Err(HfError::Tensors { folder: folder.into(), faults, help });
    }
    let has = |module: &str| found.iter().any(|(p, _)| p.theirs.starts_with(module));
    let class = match (has("cls.predictions"), has("cls.seq_relationship"), has("classifier")) {
        (_, _, true) => "BertForSequenceClassification",
        (true, true, false) => "BertForPreTraining",
        (true, false, false) => "BertForMaskedLM",
        (false, true, false) => "BertForNextSentencePrediction",
        (false, false, false) => "BertModel",
    };
    // A model with a head has the encoder and its pooler, and nothing else, below `bert.`.
    let full = |pair: &Pair| match class != "BertModel" && (!pair.of_head() || pair.theirs.starts_with("pooler.")) {
        true => format!("bert.{}", pair.theirs),
        false => pair.theirs.clone(),
    };
    let shapes: Vec<_> = found.iter().map(|(p, v)| (full(p), p.form.shape(&v.ty.shape()))).collect();
    weights::write(folder, &shapes, options.shard_bytes, |name| {
        let (pair, v) = found.iter().find(|(p, _)| full(p) == name).expect("of the list");
        match session.variable(&v.name)? {
            Array::F32(ours) => Ok(pair.form.export(ours)),
            Array::I32(_) | Array::Bool(_) => Err(HfError::Tensors {
                folder: folder.into(),
                faults: vec![format!("mis-typed: `{}` is no f32", v.name)],
                help: "export variables of f32".into(),
            }),
        }
    })?;
    let path = folder.join(CONFIG);
    let mut config = options.config.clone();
    if let Some((_, v)) = found.iter().find(|(p, _)| p.ours == "classifier/head/bias") {
        // transformers counts the classes by their names.
        let named = |c: usize| options.classes.get(c).cloned().unwrap_or(format!("LABEL_{c}"));
        let names: Vec<String> = (0..v.ty.elements()).map(named).collect();
        let labels: Map<String, Value> =
            names.iter().enumerate().map(|(c, name)| (c.to_string(), name.clone().into())).collect();
        let ids: Map<String, Value> = names.into_iter().enumerate().map(|(c, name)| (name, c.into())).collect();
        config.others.insert("id2label".into(), labels.into());
        config.others.insert("label2id".into(), ids.into());
    }
    fs::write(&path, config.text(class)).map_err(|e| unwritable(&path, e))?;
    for file in options.vocabulary {
        let target = folder.join(file.file_name().unwrap_or(file.as_os_str()));
        fs::copy(file, &target).map_err(|e| unwritable(&target, e))?;
    }
    Ok(class)
}
