//! Folders of weights as safetensors: `model.safetensors`, or shards of it that `model.safetensors.index.json` lists.
//!
//! Only the heads of the files are read on opening, and they are checked in full: sizes, that tensors lie one behind the
//! other within the file and are as large as their shape says, that no name stands twice. A tensor is read when it is
//! asked for, one at a time, so a model larger than memory can be read and written.

use super::{DataError, file, format};
use half::{bf16, f16};
use mesh::array::Array;
use ndarray::ArrayD;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The file of a model that is in one.
pub const SINGLE: &str = "model.safetensors";
/// The list of the files of a model that is in several.
pub const INDEX: &str = "model.safetensors.index.json";

/// Largest head of a file, and largest index.
const HEAD_BYTES: u64 = 64 << 20;
/// Most files, tensors, dimensions of one, and bytes of a name.
const FILES: usize = 10_000;
const TENSORS: usize = 1_000_000;
const DIMS: usize = 16;
const NAME_BYTES: usize = 1024;

/// A tensor of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Which file.
    file: usize,
    /// Where it begins in the file, and its bytes.
    at: u64,
    bytes: usize,
}

/// A folder of weights that is open for reading.
#[derive(Debug)]
pub struct Weights {
    folder: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Stored>,
}

/// The list of shards, of which only this is read.
#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Reads the heads of a folder's files.
    ///
    /// # Errors
    /// A folder without weights; a file that cannot be read or is not what it should be.
    pub fn open(folder: &Path) -> Result<Weights, DataError> {
        let mut weights = Weights { folder: folder.into(), files: vec![], tensors: BTreeMap::new() };
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        if single.is_file() {
            weights.add(single)?;
        } else if index.is_file() {
            weights.add_shards(&index)?;
        } else {
            return Err(format(folder, format!("it has neither {SINGLE} nor {INDEX}; other formats are not read")));
        }
        Ok(weights)
    }

    fn add_shards(&mut self, index: &Path) -> Result<(), DataError> {
        let mut text = Vec::new();
        let open = File::open(index).map_err(|e| file("read", index, e))?;
        open.take(HEAD_BYTES + 1).read_to_end(&mut text).map_err(|e| file("read", index, e))?;
        if text.len() as u64 > HEAD_BYTES {
            return Err(format(index, format!("it is larger than {HEAD_BYTES} bytes")));
        }
        let list: Index = serde_json::from_slice(&text).map_err(|e| format(index, e.to_string()))?;
        let shards: BTreeSet<&String> = list.weight_map.values().collect();
        if shards.len() > FILES {
            return Err(format(index, format!("it lists {} files; {FILES} are read at the most", shards.len())));
        }
        for shard in shards {
            let plain = !shard.is_empty() && !shard.starts_with('.') && !shard.contains(['/', '\\', '\0']);
            if !plain {
                return Err(format(index, format!("it lists `{}`, which is no file beside it", shard.escape_debug())));
            }
            let number = self.files.len();
            self.add(self.folder.join(shard))?;
            let held = self.tensors.iter().filter(|(_, t)| t.file == number);
            if let Some((name, _)) = held.into_iter().find(|(n, _)| list.weight_map.get(*n) != Some(shard)) {
                return Err(format(index, format!("{shard} holds `{name}`, and the index does not say so")));
            }
        }
        match list.weight_map.iter().find(|(name, _)| !self.tensors.contains_key(*name)) {
            Some((name, shard)) => Err(format(index, format!("`{name}` is said to be in {shard}, and is not"))),
            None => Ok(()),
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<(), DataError> {
        let wrong = |why: String| format(&path, why);
        let mut open = File::open(&path).map_err(|e| file("read", &path, e))?;
        let total = open.metadata().map_err(|e| file("read", &path, e))?.len();
        let mut length = [0; 8];
        open.read_exact(&mut length).map_err(|_| wrong("it is shorter than the length that it begins with".into()))?;
        let length = u64::from_le_bytes(length);
        if length > HEAD_BYTES || length > total.saturating_sub(8) {
            let most = HEAD_BYTES.min(total.saturating_sub(8));
            return Err(wrong(format!("its head is said to have {length} bytes, and can have {most}")));
        }
        let mut head = vec![0; length as usize];
        open.read_exact(&mut head).map_err(|e| file("read", &path, e))?;
        // Places without gaps or overlaps, and sizes that are those of the shapes, are checked by the format's own crate.
        let head: Metadata = serde_json::from_slice(&head).map_err(|e| wrong(format!("its head is wrong: {e}")))?;
        let begin = 8 + length;
        if begin.checked_add(head.data_len() as u64) != Some(total) {
            let why = format!("its tensors have {} bytes, and {} are there", head.data_len(), total - begin);
            return Err(wrong(why));
        }
        let number = self.files.len();
        for (name, info) in head.tensors() {
            let stored = stored(info, number, begin);
            if name.len() > NAME_BYTES || info.shape.len() > DIMS || self.tensors.len() >= TENSORS {
                let limits = format!("{TENSORS} tensors of {DIMS} dimensions, names of {NAME_BYTES} bytes");
                return Err(wrong(format!("it goes beyond what is read: {limits}")));
            }
            if self.tensors.insert(name.clone(), stored).is_some() {
                return Err(wrong(format!("`{name}` is in another file as well")));
            }
        }
        self.files.push(path);
        Ok(())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// Reads a tensor of F32, F16 or BF16 as `f32`.
    ///
    /// # Errors
    /// No tensor of that name, one of another element type, a file that cannot be read.
    pub fn read(&self, name: &str) -> Result<Array, DataError> {
        let t = self.tensors.get(name).ok_or_else(|| format(&self.folder, format!("it has no tensor `{name}`")))?;
        let path = &self.files[t.file];
        let mut bytes = vec![0; t.bytes];
        let mut open = File::open(path).map_err(|e| file("read", path, e))?;
        open.seek(SeekFrom::Start(t.at)).map_err(|e| file("read", path, e))?;
        open.read_exact(&mut bytes).map_err(|e| file("read", path, e))?;
        let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values: Vec<f32> = match t.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => return Err(format(path, format!("`{name}` is {other:?}; F32, F16 and BF16 are read"))),
        };
        let array = ArrayD::from_shape_vec(t.shape.as_slice(), values);
        array.map(Array::F32).map_err(|e| format(path, format!("`{name}`: {e}")))
    }
}

fn stored(info: &TensorInfo, file: usize, begin: u64) -> Stored {
    let (start, end) = info.data_offsets;
    Stored { dtype: info.dtype, shape: info.shape.clone(), file, at: begin + start as u64, bytes: end - start }
}

/// Writes `f32` tensors of these names and shapes into a folder, in one file, or, with `shard_bytes`, in files of so many
/// bytes of values at the most (a larger tensor has one of its own). `value` is asked for the values of each in turn.
///
/// # Errors
/// What cannot be written; an error of `value`.
pub fn write<E: From<DataError>>(
    folder: &Path,
    tensors: &[(String, Vec<usize>)],
    shard_bytes: Option<u64>,
    mut value: impl FnMut(&str) -> Result<ArrayD<f32>, E>,
) -> Result<(), E> {
    let shards = shards(tensors, shard_bytes.unwrap_or(u64::MAX));
    let name = |i: usize| match shards.len() {
        1 => SINGLE.into(),
        n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    for (i, shard) in shards.iter().enumerate() {
        write_file(&folder.join(name(i)), shard, &mut value)?;
    }
    if shards.len() > 1 {
        let total: u64 = tensors.iter().map(bytes_of).sum();
        let in_file = |(i, shard): (usize, &&[(String, Vec<usize>)])| {
            shard.iter().map(move |(t, _)| (t.clone(), name(i))).collect::<Vec<_>>()
        };
        let index = Index {
            metadata: [("total_size".to_string(), total.into())].into_iter().collect(),
            weight_map: shards.iter().enumerate().flat_map(in_file).collect(),
        };
        let path = folder.join(INDEX);
        let text = serde_json::to_string_pretty(&index).expect("keys are texts");
        fs::write(&path, text + "\n").map_err(|e| file("write", &path, e))?;
    }
    Ok(())
}

fn bytes_of((_, shape): &(String, Vec<usize>)) -> u64 {
    4 * shape.iter().product::<usize>() as u64
}

/// Runs of tensors of so many bytes at the most; one at the least.
fn shards(tensors: &[(String, Vec<usize>)], most: u64) -> Vec<&[(String, Vec<usize>)]> {
    let (mut shards, mut begin, mut bytes) = (vec![], 0, 0u64);
    for (i, t) in tensors.iter().enumerate() {
        if i > begin && bytes + bytes_of(t) > most {
            shards.push(&tensors[begin..i]);
            (begin, bytes) = (i, 0);
        }
        bytes += bytes_of(t);
    }
    shards.push(&tensors[begin..]);
    shards
}

fn write_file<E: From<DataError>>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    value: &mut impl FnMut(&str) -> Result<ArrayD<f32>, E>,
) -> Result<(), E> {
    let failed = |e: std::io::Error| E::from(file("write", path, e));
    let mut at = 0;
    let places = tensors.iter().map(|t| {
        let data_offsets = (at, at + bytes_of(t) as usize);
        at = data_offsets.1;
        (t.0.clone(), TensorInfo { dtype: Dtype::F32, shape: t.1.clone(), data_offsets })
    });
    // What transformers wants to see before it opens a file.
    let format_key = HashMap::from([("format".to_string(), "pt".to_string())]);
    let head = Metadata::new(Some(format_key), places.collect()).map_err(|e| E::from(format(path, e.to_string())))?;
    let mut head = serde_json::to_vec(&head).expect("keys are texts");
    head.resize(head.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::new(File::create(path).map_err(failed)?);
    out.write_all(&(head.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&head)).map_err(failed)?;
    for (name, shape) in tensors {
        let values = value(name)?;
        if values.shape() != shape {
            return Err(format(path, format!("`{name}` is {shape:?}, and came as {:?}", values.shape())).into());
        }
        values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(failed)?;
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(folder: &Path, shard_bytes: Option<u64>) -> Vec<(String, Vec<usize>)> {
        let tensors = [("b.weight", vec![3, 4]), ("a", vec![5]), ("scalar", vec![]), ("none", vec![0, 7])];
        let tensors: Vec<_> = tensors.into_iter().map(|(n, s)| (n.to_string(), s)).collect();
        write(folder, &tensors, shard_bytes, |name| Ok::<_, DataError>(values(&tensors, name))).unwrap();
        tensors
    }

    fn values(tensors: &[(String, Vec<usize>)], name: &str) -> ArrayD<f32> {
        let shape = &tensors.iter().find(|t| t.0 == name).unwrap().1;
        let mut next = name.len() as f32;
        ArrayD::from_shape_simple_fn(shape.as_slice(), || {
            next += 0.37;
            next
        })
    }

    #[test]
    fn what_is_written_is_read_in_one_file_or_in_shards() {
        for (shard_bytes, files) in [(None, 1), (Some(1 << 20), 1), (Some(24), 2 + 1), (Some(1), 4 + 1)] {
            let folder = tempfile::tempdir().unwrap();
            let tensors = example(folder.path(), shard_bytes);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), files, "{shard_bytes:?}");
            let weights = Weights::open(folder.path()).unwrap();
            assert_eq!(weights.tensors().len(), tensors.len());
            for (name, shape) in &tensors {
                assert_eq!(weights.tensors()[name].shape, *shape);
                assert_eq!(weights.read(name).unwrap(), Array::F32(values(&tensors, name)), "{name}");
            }
        }
    }

    fn file_of(head: &str, data: &[u8]) -> Vec<u8> {
        [&(head.len() as u64).to_le_bytes(), head.as_bytes(), data].concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(SINGLE), bytes).unwrap();
        let refused = Weights::open(folder.path()).unwrap_err().to_string();
        assert!(refused.starts_with("D0002") && refused.contains(SINGLE), "{refused}");
        refused
    }

    #[test]
    fn half_precision_becomes_f32_and_integers_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let head = r#"{"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"i":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}}"#;
        let data = [f16::from_f32(1.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()].concat();
        let data =
            [data, [bf16::from_f32(3.0).to_le_bytes(), bf16::from_f32(-0.25).to_le_bytes()].concat(), vec![0; 8]];
        fs::write(folder.path().join(SINGLE), file_of(head, &data.concat())).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.read("h").unwrap(), Array::from(ndarray::arr1(&[1.5f32, -2.0])));
        assert_eq!(weights.read("b").unwrap(), Array::from(ndarray::arr1(&[3.0f32, -0.25])));
        assert!(weights.read("i").unwrap_err().to_string().contains("`i` is I64"));
        assert!(weights.read("nothing").unwrap_err().to_string().contains("no tensor `nothing`"));
    }

    #[test]
    fn files_that_lie_are_refused_before_anything_is_read() {
        let entry = |shape: &str, from: u64, to: u64| {
            format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let one = |e: String| format!(r#"{{"x":{e}}}"#);
        let cases = [
            ("out of the file", file_of(&one(entry("[2]", 0, 8)), &[0; 4])),
            ("more than is named", file_of(&one(entry("[2]", 0, 8)), &[0; 12])),
            ("not of its shape's size", file_of(&one(entry("[3]", 0, 8)), &[0; 8])),
            ("a shape that overflows", file_of(&one(entry("[4294967296,4294967296,2]", 0, 8)), &[0; 8])),
            ("before its begin", file_of(&one(entry("[2]", 8, 0)), &[0; 8])),
            ("a gap", file_of(&one(entry("[1]", 4, 8)), &[0; 8])),
            ("offsets that overflow", file_of(&one(entry("[1]", u64::MAX - 3, u64::MAX)), &[0; 8])),
            ("overlap", file_of(&format!(r#"{{"x":{},"y":{}}}"#, entry("[2]", 0, 8), entry("[2]", 4, 12)), &[0; 12])),
            ("not JSON", file_of("{nonsense", &[])),
            ("too many dimensions", file_of(&one(entry(&format!("[{}1]", "1,".repeat(16)), 0, 4)), &[0; 4])),
            ("a name without end", file_of(&format!(r#"{{"{}":{}}}"#, "x".repeat(2000), entry("[1]", 0, 4)), &[0; 4])),
            ("nested without end", file_of(&"[".repeat(100_000), &[])),
            ("a head larger than the file", (1u64 << 40).to_le_bytes().to_vec()),
            ("a head that wraps", u64::MAX.to_le_bytes().to_vec()),
            ("empty", vec![]),
        ];
        for (what, bytes) in cases {
            let refused = refusal(&bytes);
            assert!(refused.len() < 4000, "{what}: {refused}");
        }
    }

    #[test]
    fn an_index_that_lies_is_refused() {
        let sound = tempfile::tempdir().unwrap();
        example(sound.path(), Some(24));
        let index = fs::read_to_string(sound.path().join(INDEX)).unwrap();
        let first = "model-00001-of-00002.safetensors";
        let cases = [
            ("another folder's file", index.replace(first, &format!("../{first}"))),
            ("a file that is not there", index.replace(first, "model-00007-of-00002.safetensors")),
            ("a tensor that is not there", index.replace("\"none\"", "\"nine\"")),
            ("a tensor in another file", index.replacen("00002-of", "00001-of", 1)),
            ("not an index", "[]".into()),
        ];
        for (what, changed) in cases {
            assert_ne!(index, changed, "{what}");
            fs::write(sound.path().join(INDEX), changed).unwrap();
            let refused = Weights::open(sound.path()).unwrap_err().to_string();
            assert!(refused.starts_with("D000"), "{what}: {refused}");
        }
        assert!(Weights::open(&sound.path().join("nowhere")).unwrap_err().to_string().contains("neither"));
    }

    proptest! {
        #[test]
        fn no_damage_makes_the_reader_panic(cut in 0usize..400, at in 0usize..400, to: u8) {
            let folder = tempfile::tempdir().unwrap();
            example(folder.path(), None);
            let path = folder.path().join(SINGLE);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = to;
            bytes.truncate(bytes.len().saturating_sub(cut % 3 * cut));
            fs::write(&path, &bytes).unwrap();
            if let Ok(weights) = Weights::open(folder.path()) {
                for name in weights.tensors().keys() {
                    let _ = weights.read(name);
                }
            }
        }
    }
}
