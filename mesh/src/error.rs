//! Errors: what was wrong, where, and what to do.

use crate::dim::Name;
use crate::layout::AT;
use std::fmt;
use std::panic::Location;

/// A place in the user's source.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// File as the compiler names it.
    pub file: &'static str,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

impl Place {
    /// The caller's place.
    #[track_caller]
    pub fn here() -> Place {
        Location::caller().into()
    }
}
impl From<&Location<'static>> for Place {
    fn from(l: &Location<'static>) -> Self {
        Place { file: l.file(), line: l.line(), column: l.column() }
    }
}
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}
impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why an op refuses its inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The numbered constraint of the op's file: `C2`.
    pub constraint: &'static str,
    /// What was wrong, in words.
    pub message: String,
    /// What to do; may be empty.
    pub help: String,
}

/// An op refuses its inputs: `refuse("C1", "..", "..")`.
pub fn refuse<T>(constraint: &'static str, message: impl Into<String>, help: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { constraint, message: message.into(), help: help.into() })
}

/// `1.5 KiB (1,536 bytes)`.
fn amount(n: usize) -> String {
    use crate::plan::describe::{bytes, thousands};
    format!("{} ({} bytes)", bytes(n), thousands(n as u64))
}

fn both(first: &str, second: &str) -> String {
    match first.strip_prefix(AT) {
        Some(_) => format!("the stage `{first}` and dimension `{second}`"),
        None => format!("dimensions `{first}` and `{second}`"),
    }
}

/// The causes of an error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Cause {
    /// An op refused its inputs.
    #[error("`{op}` {}", refusal.message)]
    Op {
        /// Name of the op.
        op: &'static str,
        /// Why.
        refusal: Refusal,
    },
    /// A variable is declared twice with unlike types.
    #[error("variable `{name}` is {first} and cannot be {second} as well")]
    VariableType {
        /// The variable.
        name: Name,
        /// The first declaration's type.
        first: String,
        /// The second one's.
        second: String,
    },
    /// Two inputs, outputs or functions of one name.
    #[error("there are two {what} called `{name}`")]
    TwiceNamed {
        /// "inputs", "outputs", ..
        what: &'static str,
        /// The name.
        name: Name,
    },
    /// Text that is not of the form it should have.
    #[error("`{text}` is not {expected}")]
    Syntax {
        /// The text.
        text: String,
        /// What was expected, with an example.
        expected: String,
    },
    /// A layout rule names an axis that the mesh does not have.
    #[error("layout rule `{rule}` names the axis `{axis}`, which the mesh `{mesh}` does not have")]
    UnknownAxis {
        /// The rule.
        rule: String,
        /// The axis.
        axis: Name,
        /// The mesh.
        mesh: String,
        /// The nearest axis.
        nearest: Option<Name>,
    },
    /// A layout rule names a dimension that no tensor has which it is for.
    #[error("layout rule `{rule}` names the dimension `{dim}`, which {lacking}")]
    UnknownDimension {
        /// The rule.
        rule: String,
        /// The dimension.
        dim: Name,
        /// Who does not have it: "no tensor of the program has".
        lacking: String,
        /// The nearest dimension.
        nearest: Option<Name>,
    },
    /// A layout rule's scope matches no path of the program.
    #[error("layout rule `{rule}` is for the scope `{scope}`, in which the program has nothing")]
    UnknownScope {
        /// The rule.
        rule: String,
        /// The scope.
        scope: Name,
        /// The nearest path, or section.
        nearest: Option<Name>,
    },
    /// A layout has two rules for one dimension.
    #[error("the layout has two rules for dimension `{dim}`")]
    TwoRules {
        /// The dimension.
        dim: Name,
    },
    /// Two dimensions of one tensor lie on one axis.
    #[error("{} of {tensor} both lie on the mesh axis `{axis}`", both(first, second))]
    AxisTwice {
        /// The tensor: op and type.
        tensor: String,
        /// The axis.
        axis: Name,
        /// One dimension.
        first: Name,
        /// The other one.
        second: Name,
    },
    /// A layout rule names a place along an axis that there is not.
    #[error("layout rule `{rule}` names a place along the axis `{axis}`, which has {size}, from 0 on")]
    NoSuchStage {
        /// The rule.
        rule: String,
        /// The axis.
        axis: Name,
        /// Its size.
        size: usize,
    },
    /// A tensor that is split would be whole on every device, and nobody asked for it.
    #[error(
        "`{dim}`, split over the axis `{axis}`, would be gathered for this `{reader}`: every device would have all of {tensor} \
         and receive {} of it in each run, and no rule asks for that",
        amount(*.bytes)
    )]
    SilentGather {
        /// The tensor.
        tensor: String,
        /// The op that takes it.
        reader: &'static str,
        /// The dimension.
        dim: Name,
        /// The axes.
        axis: Name,
        /// Bytes that a device receives.
        bytes: usize,
    },
    /// Blocks of a dimension are to go round, and cannot.
    #[error("layout rule `{rule}` lets blocks go round, but {why}")]
    NoRing {
        /// The rule.
        rule: String,
        /// What is in the way.
        why: String,
    },
    /// The mesh does not have as many places as there are devices.
    #[error("the mesh `{mesh}` has {size} places, but there are {devices} devices")]
    MeshSize {
        /// The mesh.
        mesh: String,
        /// Its size.
        size: usize,
        /// The devices.
        devices: usize,
    },
    /// A dimension has fewer chunks than its axes have devices.
    #[error(
        "dimension `{dim}` (size {size}, {chunks} chunks) of {tensor} cannot be split over the mesh axis `{axis}` (size {shards})"
    )]
    MoreShardsThanChunks {
        /// The tensor: op and type.
        tensor: String,
        /// The dimension.
        dim: Name,
        /// Its size.
        size: usize,
        /// Its chunks.
        chunks: usize,
        /// The axis, or several: `data+x`.
        axis: Name,
        /// The shards.
        shards: usize,
    },
    /// The plan does not fit into the memory allowed.
    #[error("device {device} needs {}, but may use {}", amount(*needed), amount(*budget))]
    OverMemory {
        /// The device with the highest need.
        device: usize,
        /// Its peak.
        needed: usize,
        /// The budget.
        budget: usize,
        /// The largest tensors alive at the peak: name, bytes, place.
        largest: Vec<(String, usize, Place)>,
    },
    /// Something fed or fetched is not what the program says.
    #[error("{what}")]
    Feed {
        /// What is wrong.
        what: String,
        /// What to do.
        help: String,
    },
    /// A program from outside that breaks a rule which the builder keeps.
    #[error("the program that was sent is not valid: {what}")]
    Invalid {
        /// Which.
        what: String,
    },
    /// Not there yet in this version.
    #[error("{what} is not supported yet")]
    NotYet {
        /// What.
        what: String,
        /// What to use instead.
        help: String,
    },
}

impl Cause {
    /// The error's code; `L` for layouts, `P` for programs, `M` for memory.
    pub fn code(&self) -> &'static str {
        match self {
            Cause::Op { .. } => "P0001",
            Cause::VariableType { .. } => "P0002",
            Cause::TwiceNamed { .. } => "P0003",
            Cause::Feed { .. } => "P0004",
            Cause::NotYet { .. } => "P0005",
            Cause::Invalid { .. } => "P0006",
            Cause::Syntax { .. } => "L0001",
            Cause::UnknownAxis { .. } => "L0002",
            Cause::UnknownDimension { .. } => "L0003",
            Cause::TwoRules { .. } => "L0004",
            Cause::AxisTwice { .. } => "L0005",
            Cause::MeshSize { .. } => "L0006",
            Cause::MoreShardsThanChunks { .. } => "L0007",
            Cause::UnknownScope { .. } => "L0008",
            Cause::NoSuchStage { .. } => "L0009",
            Cause::SilentGather { .. } => "L0010",
            Cause::NoRing { .. } => "L0011",
            Cause::OverMemory { .. } => "M0001",
        }
    }

    /// What to do about it.
    pub fn help(&self) -> String {
        let nearest = |n: &Option<Name>| n.as_ref().map(|n| format!("did you mean `{n}`?"));
        match self {
            Cause::Op { refusal, .. } => refusal.help.clone(),
            Cause::VariableType { .. } => "give one of them another name or scope".into(),
            Cause::TwiceNamed { .. } => "give one of them another name".into(),
            Cause::Invalid { .. } => "send what a `ProgramBuilder` of this version has finished".into(),
            Cause::Feed { help, .. } | Cause::NotYet { help, .. } => help.clone(),
            Cause::Syntax { .. } => String::new(),
            Cause::UnknownAxis { nearest: n, .. } => {
                nearest(n).unwrap_or("add the axis to the mesh, or take the rule out".into())
            }
            Cause::UnknownDimension { nearest: n, .. } => nearest(n).unwrap_or("take the rule out".into()),
            Cause::UnknownScope { nearest: n, .. } => {
                nearest(n).unwrap_or("patterns are of whole paths: `decoder` and all below it is `decoder/**`".into())
            }
            Cause::TwoRules { .. } => "keep one of them".into(),
            Cause::AxisTwice { first, second, .. } if first.starts_with(AT) => {
                format!("do not split `{second}` over the axis of the stages: give its scope a rule `{second}:none`")
            }
            Cause::AxisTwice { first, second, .. } => {
                format!("map only one of `{first}` and `{second}` to this axis, or override this tensor's layout")
            }
            Cause::NoSuchStage { size, .. } => {
                format!("use a place below {size}, or a mesh with more of them along the axis")
            }
            Cause::SilentGather { dim, axis, .. } => format!(
                "split another dimension over `{axis}`; or say that it is meant: `{dim}:{axis}?` where it may be whole where it \
                 must, `{dim}:none` for the scope that needs it whole, `gathers:allow` for all of the layout"
            ),
            Cause::NoRing { .. } => "let it be gathered: `axis?` in place of `ring(axis)`".into(),
            Cause::MeshSize { devices, .. } => {
                format!("make the axis sizes multiply to {devices}, or change the number of devices")
            }
            Cause::MoreShardsThanChunks { chunks: 1, dim, axis, .. } => {
                format!("do not split `{dim}`: leave its rule out, or let it stay whole where it must, `{dim}:{axis}?`")
            }
            Cause::MoreShardsThanChunks { chunks, dim, axis, .. } => {
                let mesh = if axis.contains('+') { format!("{chunks} devices") } else { format!("{axis}={chunks}") };
                format!(
                    "use a mesh with {mesh} or less there, let it stay whole where it must, `{dim}:{axis}?`, or give the \
                     program more chunks (`--chunks`)"
                )
            }
            Cause::OverMemory { .. } => {
                "split more dimensions over more devices, use a smaller crop or batch, put the \
                                         large ones in a recompute region, or raise the budget"
                    .into()
            }
        }
    }
}

/// An error with its place in the user's source.
#[derive(Clone, PartialEq)]
pub struct Error {
    /// What was wrong.
    pub cause: Cause,
    /// The user's source line, where there is one.
    pub place: Option<Place>,
    /// Further facts, a line each.
    pub notes: Vec<String>,
}

impl Error {
    /// An error without a place.
    pub fn new(cause: Cause) -> Error {
        Error { cause, place: None, notes: vec![] }
    }
    /// The error at that place.
    pub fn at(mut self, place: Place) -> Error {
        self.place.get_or_insert(place);
        self
    }
    /// The error with one more fact.
    pub fn note(mut self, note: impl Into<String>) -> Error {
        self.notes.push(note.into());
        self
    }
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Error::new(cause)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.cause.code(), self.cause)?;
        if let Some(p) = &self.place {
            write!(f, "\n  --> {p}")?;
        }
        if let Cause::Op { refusal, .. } = &self.cause {
            write!(f, "\n  = constraint {} of the op", refusal.constraint)?;
        }
        if let Cause::OverMemory { largest, .. } = &self.cause {
            for (name, bytes, place) in largest {
                write!(f, "\n  = {}: {name} ({place})", amount(*bytes))?;
            }
        }
        for n in &self.notes {
            write!(f, "\n  = {n}")?;
        }
        let help = self.cause.help();
        if !help.is_empty() {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl std::error::Error for Error {}

/// The nearest of some names to a mistyped one, if any is near.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    near(word, known).first().copied()
}

/// Those of some names that are near to a mistyped one (edit distance at most a third of its length, at least 2), the
/// nearest first.
pub fn near<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let distances = known.into_iter().map(|k| (edit_distance(word, k), k));
    let mut near: Vec<(usize, &str)> = distances.filter(|(d, k)| *d <= (k.chars().count() / 3).max(2)).collect();
    near.sort_unstable();
    near.into_iter().map(|(_, k)| k).collect()
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
