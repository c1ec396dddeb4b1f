//! Programs and arrays as messages.
//!
//! A program is a flat list of nodes; an op travels as JSON with bounded numbers, texts, lists and depth. Types are not
//! sent: [`Program::checked`] works them out again, so that a program from outside is as sound as one that was built here.

use crate::watch::{NonFinite, Origin};
use mesh::array::Array;
use mesh::dim::{DType, Dim, Name, Type, is_name};
use mesh::error::{Cause, Error, Place};
use mesh::graph::{Node, NodeId, Role};
use mesh::plan::Part;
use mesh::program::{Chunking, Function, Program, VarId, Variable};
use prost::Message;
use proto::{control, program as wire};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

/// Version of the program format.
const VERSION: u32 = 3;
/// Largest encoded program.
pub const PROGRAM_BYTES: usize = 64 << 20;
/// Bytes of a part of a stream.
const PART_BYTES: usize = 1 << 20;
/// Largest array that is taken from the other side.
pub const ARRAY_BYTES: usize = 8 << 30;

fn invalid(what: impl Into<String>) -> Error {
    Cause::Invalid { what: what.into() }.into()
}

fn dtype(d: DType) -> wire::DType {
    match d {
        DType::F32 => wire::DType::F32,
        DType::Bf16 => wire::DType::Bf16,
        DType::F16 => wire::DType::F16,
        DType::I32 => wire::DType::I32,
        DType::Bool => wire::DType::Bool,
    }
}

fn dtype_from(d: i32) -> Result<DType, Error> {
    match wire::DType::try_from(d) {
        Ok(wire::DType::F32) => Ok(DType::F32),
        Ok(wire::DType::Bf16) => Ok(DType::Bf16),
        Ok(wire::DType::F16) => Ok(DType::F16),
        Ok(wire::DType::I32) => Ok(DType::I32),
        Ok(wire::DType::Bool) => Ok(DType::Bool),
        Ok(wire::DType::Unspecified) | Err(_) => Err(invalid(format!("{d} is no dtype"))),
    }
}

fn role(r: Role) -> wire::Role {
    match r {
        Role::Forward => wire::Role::Forward,
        Role::Backward => wire::Role::Backward,
        Role::Gradient => wire::Role::Gradient,
        Role::Update => wire::Role::Update,
        Role::Variable => wire::Role::Variable,
    }
}

fn role_from(r: i32) -> Result<Role, Error> {
    Role::ALL.into_iter().find(|own| i32::from(role(*own)) == r).ok_or_else(|| invalid(format!("{r} is no role")))
}

/// Texts by index, each once.
#[derive(Default)]
struct Texts {
    list: Vec<String>,
    index: HashMap<String, u32>,
}

impl Texts {
    fn add(&mut self, text: &str) -> u32 {
        if let Some(&i) = self.index.get(text) {
            return i;
        }
        self.list.push(text.into());
        self.index.insert(text.into(), self.list.len() as u32 - 1);
        self.list.len() as u32 - 1
    }
    fn place(&mut self, p: Place) -> Option<wire::Place> {
        Some(wire::Place { file: self.add(p.file), line: p.line, column: p.column })
    }
}

/// A program as bytes, the same ones for the same program.
pub fn encode(program: &Program) -> Result<Vec<u8>, Error> {
    let mut texts = Texts::default();
    let variables = program
        .variables
        .iter()
        .map(|v| {
            let dims = v.ty.dims.iter().map(|d| wire::Dim { name: d.name.to_string(), size: d.size as u64 }).collect();
            Ok(wire::Variable {
                name: v.name.to_string(),
                r#type: Some(wire::Type { dtype: dtype(v.ty.dtype).into(), dims }),
                init: json(&v.init)?,
                trainable: v.trainable,
                role: role(v.role).into(),
                place: texts.place(v.place),
            })
        })
        .collect::<Result<_, Error>>()?;
    let edges =
        |list: &[(Name, NodeId)]| list.iter().map(|(n, i)| wire::Edge { name: n.to_string(), node: i.0 }).collect();
    let functions = program
        .functions
        .values()
        .map(|f| {
            let nodes = f.nodes.iter().map(|n| {
                Ok(wire::Node {
                    op: json(&n.op)?,
                    inputs: n.inputs.iter().map(|i| i.0).collect(),
                    place: texts.place(n.place),
                    scope: texts.add(&n.scope),
                    layout: n.layout.as_ref().map(|l| l.to_string()),
                    role: role(n.role).into(),
                })
            });
            Ok(wire::Function {
                name: f.name.to_string(),
                nodes: nodes.collect::<Result<_, Error>>()?,
                inputs: edges(&f.inputs),
                outputs: edges(&f.outputs),
                assigns: f.assigns.iter().map(|(v, n)| wire::Assign { variable: v.0, node: n.0 }).collect(),
            })
        })
        .collect::<Result<_, Error>>()?;
    let grains = program.chunking.grains().map(|(n, g)| wire::Dim { name: n.to_string(), size: g as u64 }).collect();
    let message = wire::Program {
        version: VERSION,
        texts: texts.list,
        variables,
        functions,
        chunks: program.chunking.chunks as u32,
        first: program.chunking.first.as_ref().map(ToString::to_string),
        grains,
    };
    Ok(message.encode_to_vec())
}

/// BLAKE3 of what a program computes, wherever in a source it was written.
///
/// # Errors
/// A program that cannot be encoded.
pub fn hash(program: &Program) -> Result<String, Error> {
    let nowhere = Place { file: "", line: 0, column: 0 };
    let mut program = program.clone();
    program.variables.iter_mut().for_each(|v| v.place = nowhere);
    program.functions.values_mut().flat_map(|f| &mut f.nodes).for_each(|n| n.place = nowhere);
    Ok(blake3::hash(&encode(&program)?).to_hex().to_string())
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|e| invalid(e.to_string()))
}

/// Reads JSON whose numbers, texts, lists and depth are bounded.
fn bounded<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    fn small(value: &serde_json::Value, depth: usize) -> bool {
        match value {
            _ if depth > 6 => false,
            serde_json::Value::Null | serde_json::Value::Bool(_) => true,
            serde_json::Value::Number(n) => n.as_f64().is_some_and(|v| v.abs() <= 4294967295.0),
            serde_json::Value::String(s) => s.len() <= 256,
            serde_json::Value::Array(a) => a.len() <= 64 && a.iter().all(|v| small(v, depth + 1)),
            serde_json::Value::Object(o) => o.len() <= 64 && o.values().all(|v| small(v, depth + 1)),
        }
    }
    if bytes.len() > 64 << 10 {
        return Err(invalid("an op of more than 64 KiB"));
    }
    let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| invalid(format!("an op: {e}")))?;
    if !small(&value, 0) {
        return Err(invalid("an op with a number, text, list or depth beyond all bounds"));
    }
    serde_json::from_value(value).map_err(|e| invalid(format!("an op: {e}")))
}

/// A file's name for as long as the process lives: places hold it so. Programs name few files.
fn file_name(text: &str) -> Result<&'static str, Error> {
    static KNOWN: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(k) = known.get(text) {
        return Ok(k);
    }
    if text.len() > 1024 || known.len() >= 4096 {
        return Err(invalid("too many source files, or too long a name"));
    }
    let kept: &'static str = Box::leak(text.to_string().into_boxed_str());
    known.insert(kept);
    Ok(kept)
}

/// The program that those bytes stand for.
///
/// # Errors
/// Bytes that are no program, of another version, or that break a rule.
pub fn decode(bytes: &[u8]) -> Result<Program, Error> {
    if bytes.len() > PROGRAM_BYTES {
        return Err(invalid(format!("{} bytes, and {PROGRAM_BYTES} are the most", bytes.len())));
    }
    let message = wire::Program::decode(bytes).map_err(|e| invalid(e.to_string()))?;
    if message.version != VERSION {
        let text = format!("it is of format {}, and this program reads format {VERSION}", message.version);
        return Err(invalid(text));
    }
    let texts = message.texts;
    let text = |i: u32| texts.get(i as usize).map(String::as_str).ok_or_else(|| invalid("a text that is not there"));
    let place = |p: Option<wire::Place>| {
        let p = p.unwrap_or_default();
        Ok::<_, Error>(Place { file: file_name(text(p.file)?)?, line: p.line, column: p.column })
    };
    let name = |n: String| {
        if n.is_empty() || n.len() > 1024 { Err(invalid("an empty or endless name")) } else { Ok(Name::from(n)) }
    };
    let dims = |list: Vec<wire::Dim>| {
        let one = |d: wire::Dim| match usize::try_from(d.size) {
            Ok(size) if is_name(&d.name) => Ok(Dim { name: d.name.into(), size }),
            _ => Err(invalid(format!("`{}` is no dimension", d.name))),
        };
        list.into_iter().map(one).collect::<Result<Vec<Dim>, Error>>()
    };
    let mut variables = Vec::with_capacity(message.variables.len());
    for v in message.variables {
        let ty = v.r#type.unwrap_or_default();
        variables.push(Variable {
            name: name(v.name)?,
            ty: Type::new(dtype_from(ty.dtype)?, dims(ty.dims)?),
            init: bounded(&v.init)?,
            trainable: v.trainable,
            role: role_from(v.role)?,
            place: place(v.place)?,
        });
    }
    let edges = |list: Vec<wire::Edge>| {
        list.into_iter().map(|e| Ok((name(e.name)?, NodeId(e.node)))).collect::<Result<Vec<_>, Error>>()
    };
    let mut functions = BTreeMap::new();
    for f in message.functions {
        let mut nodes = Vec::with_capacity(f.nodes.len());
        for n in f.nodes {
            nodes.push(Node {
                op: bounded(&n.op)?,
                inputs: n.inputs.into_iter().map(NodeId).collect(),
                // Worked out by `checked`.
                ty: Type::scalar(DType::F32),
                place: place(n.place)?,
                scope: text(n.scope)?.into(),
                layout: n.layout.map(Name::from),
                role: role_from(n.role)?,
            });
        }
        let function = Function {
            name: name(f.name)?,
            nodes,
            inputs: edges(f.inputs)?,
            outputs: edges(f.outputs)?,
            assigns: f.assigns.into_iter().map(|a| (VarId(a.variable), NodeId(a.node))).collect(),
            blocks: vec![],
        };
        if functions.insert(function.name.clone(), function).is_some() {
            return Err(invalid("two functions of one name"));
        }
    }
    let mut chunking = Chunking::default();
    chunking.chunks = message.chunks as usize;
    chunking.first = message.first.map(name).transpose()?;
    for d in dims(message.grains)? {
        chunking.raise_grain(d.name, d.size);
    }
    Program { variables, functions, chunking, stages: vec![] }.checked()
}

/// Bytes, cut for the parts of a stream.
pub fn slices(bytes: bytes::Bytes) -> impl Iterator<Item = bytes::Bytes> {
    (0..bytes.len()).step_by(PART_BYTES).map(move |i| bytes.slice(i..(i + PART_BYTES).min(bytes.len())))
}

/// A box of a tensor as the parts of a stream: its head, then its bytes. It begins at `start`; `holders` are the devices that hold it.
pub fn parts(
    name: control::ArrayName,
    holders: Vec<u32>,
    start: &[usize],
    array: &Array,
) -> impl Iterator<Item = control::ArrayPart> + use<> {
    use control::array_part::Kind;
    let head = control::ArrayHead {
        name: Some(name),
        dtype: dtype(array.dtype()).into(),
        start: start.iter().map(|s| *s as u64).collect(),
        shape: array.shape().iter().map(|n| *n as u64).collect(),
        holders,
    };
    let all = std::iter::once(Kind::Head(head)).chain(slices(array.to_bytes().into()).map(Kind::Data));
    all.map(|kind| control::ArrayPart { kind: Some(kind) })
}

/// Whether that is the head of just this box of a tensor.
pub fn is_head_of(head: &control::ArrayHead, part: &Part) -> bool {
    let ranges = || part.region.0.iter().map(|(_, r)| r);
    dtype_from(head.dtype).is_ok_and(|d| d == part.ty.dtype)
        && head.start.iter().copied().eq(ranges().map(|r| r.start as u64))
        && head.shape.iter().copied().eq(ranges().map(|r| r.len() as u64))
}

/// A question for what a program would take, as the parts of a stream: its head, then the encoded program.
pub fn foresee(head: control::ForeseeHead, program: &bytes::Bytes) -> Vec<control::ForeseePart> {
    use control::foresee_part::Kind;
    let data = slices(program.clone()).map(Kind::Program);
    std::iter::once(Kind::Head(head)).chain(data).map(|kind| control::ForeseePart { kind: Some(kind) }).collect()
}

/// Holds the parts of a stream of arrays to their order and to the sizes that their heads say.
#[derive(Default)]
pub struct Sequence {
    /// Bytes of the present array that are still to come.
    left: usize,
}

impl Sequence {
    /// Looks at the next part.
    ///
    /// # Errors
    /// One that does not follow, and arrays beyond [`ARRAY_BYTES`]; in words.
    pub fn take(&mut self, part: &control::ArrayPart) -> Result<(), String> {
        use control::array_part::Kind;
        match &part.kind {
            Some(Kind::Head(head)) if self.left == 0 => {
                let dtype = dtype_from(head.dtype).map_err(|e| e.to_string())?;
                if head.shape.len() > 16 || head.start.len() != head.shape.len() {
                    return Err("an array's start and extents do not belong together".into());
                }
                let bytes = head.shape.iter().try_fold(dtype.bytes(), |n, s| n.checked_mul(usize::try_from(*s).ok()?));
                self.left = bytes.filter(|b| *b <= ARRAY_BYTES).ok_or("an array beyond all bounds")?;
            }
            Some(Kind::Data(data)) if self.left > 0 && data.len() <= self.left => self.left -= data.len(),
            _ => return Err("the parts of an array do not follow each other".into()),
        }
        Ok(())
    }

    /// That the stream may end here.
    ///
    /// # Errors
    /// An array that is cut short; in words.
    pub fn end(&self) -> Result<(), String> {
        if self.left == 0 { Ok(()) } else { Err(format!("{} bytes of an array are missing", self.left)) }
    }
}

/// Puts the parts of a stream of arrays together again.
#[derive(Default)]
pub struct Assembler {
    sequence: Sequence,
    head: control::ArrayHead,
    bytes: Vec<u8>,
}

impl Assembler {
    /// Takes the next part; gives an array when it is complete.
    ///
    /// # Errors
    /// As for [`Sequence::take`].
    pub fn take(&mut self, part: control::ArrayPart) -> Result<Option<(control::ArrayHead, Array)>, String> {
        use control::array_part::Kind;
        self.sequence.take(&part)?;
        match part.kind {
            Some(Kind::Head(head)) => self.head = head,
            Some(Kind::Data(data)) => self.bytes.extend_from_slice(&data),
            None => {}
        }
        if self.sequence.left > 0 {
            return Ok(None);
        }
        let head = std::mem::take(&mut self.head);
        let shape: Vec<usize> = head.shape.iter().map(|n| *n as usize).collect();
        let dtype = dtype_from(head.dtype).map_err(|e| e.to_string())?;
        let array = Array::from_bytes(dtype, &shape, &self.bytes).ok_or("an array of no known dtype")?;
        self.bytes.clear();
        Ok(Some((head, array)))
    }

    /// That the stream may end here.
    ///
    /// # Errors
    /// As for [`Sequence::end`].
    pub fn end(&self) -> Result<(), String> {
        self.sequence.end()
    }
}

/// As a message.
pub fn non_finite(f: &NonFinite) -> control::NonFinite {
    let (variable, index) = match f.origin {
        Origin::Variable(v) => (Some(v as u32), 0),
        Origin::Step(s) => (None, s as u32),
    };
    control::NonFinite { variable, index, device: f.device as u32, nan: f.nan, text: f.text.clone() }
}

/// Out of a message.
pub fn non_finite_of(f: control::NonFinite) -> NonFinite {
    let origin = f.variable.map_or(Origin::Step(f.index as usize), |v| Origin::Variable(v as usize));
    NonFinite { origin, device: f.device as usize, nan: f.nan, text: f.text }
}
