//! Sentences with labels, to fine-tune an encoder on: classes by name, or numbers.

use super::packages;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use worker::data::DataError;

/// Bytes of a file at the most.
const FILE: u64 = 1 << 30;
/// Classes at the most.
const CLASSES: usize = 1 << 12;

/// What a label is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LabelKind {
    /// One of several classes.
    Classes,
    /// A number.
    Regression,
}

/// A sentence and its label: the number of its class, or a number.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The sentence.
    pub text: String,
    /// The class's number, or the number itself.
    pub label: f32,
}

/// Labelled sentences, some of them held out.
#[derive(Clone, Debug)]
pub struct Sentences {
    /// What they are, for people.
    pub name: String,
    /// What the classes are called, in the order of their numbers; empty for a regression.
    pub classes: Vec<String>,
    /// To train on.
    pub train: Vec<Labelled>,
    /// Held out.
    pub held_out: Vec<Labelled>,
}

fn unusable(path: &Path, why: impl Into<String>) -> DataError {
    DataError::Format { path: path.into(), why: why.into() }
}

impl Sentences {
    /// `sentiment` (film reviews out of a package: negative or positive, of those rated 1 or more from 0; or their
    /// ratings), a file of JSON lines (`.jsonl`, `.ndjson`) with `text` and `label`, or one of lines `text`, tab, `label`.
    /// A sentence is held out by the probability `held_out`, by a hash of its text alone.
    ///
    /// # Errors
    /// A file that is not there or not usable, by line; one class only; nothing to train on or nothing held out.
    pub fn open(
        data: &str,
        kind: LabelKind,
        held_out: f64,
        cache: &Path,
        say: impl FnMut(&str),
    ) -> Result<Sentences, DataError> {
        let is_package = data == "sentiment";
        let path = if is_package { packages::ratings(cache, say)? } else { data.into() };
        let name = if is_package { "sentences of film reviews".into() } else { data.to_string() };
        let mut bytes = Vec::new();
        let read = std::fs::File::open(&path).and_then(|f| f.take(FILE + 1).read_to_end(&mut bytes));
        read.map_err(|e| DataError::File { what: "read", path: path.clone(), why: e.to_string() })?;
        if bytes.len() as u64 > FILE {
            return Err(unusable(&path, format!("it is larger than {FILE} bytes")));
        }
        let pairs = match (is_package, path.extension().and_then(|e| e.to_str())) {
            (true, _) => rated(&String::from_utf8_lossy(&bytes), kind),
            (false, extension) => {
                let text = String::from_utf8(bytes).map_err(|e| {
                    let at = e.utf8_error().valid_up_to();
                    unusable(&path, format!("byte {at} is no UTF-8; bring the text to UTF-8 first"))
                })?;
                let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
                let filled = lines.filter(|(_, l)| !l.trim().is_empty());
                let one = |(n, line): (usize, &str)| {
                    match extension {
                        Some("jsonl" | "ndjson") => json(line),
                        _ => tabbed(line),
                    }
                    .map_err(|why| unusable(&path, format!("line {}: {why}", n + 1)))
                };
                filled.map(one).collect::<Result<Vec<_>, _>>()?
            }
        };
        Sentences::of(name, pairs, kind, held_out).map_err(|why| unusable(&path, why))
    }

    fn of(name: String, pairs: Vec<(String, String)>, kind: LabelKind, held_out: f64) -> Result<Sentences, String> {
        let mut classes: BTreeMap<String, f32> = BTreeMap::new();
        if kind == LabelKind::Classes {
            classes.extend(pairs.iter().map(|(_, label)| (label.clone(), 0.0)));
            if classes.len() < 2 {
                return Err(format!("it has {} of the two classes or more that a task needs", classes.len()));
            }
            if classes.len() > CLASSES {
                let why = "if the labels are numbers, say `--task regression`";
                return Err(format!("there are {} classes in it, and {CLASSES} at the most; {why}", classes.len()));
            }
            classes.values_mut().enumerate().for_each(|(n, class)| *class = n as f32);
        }
        let mut sentences =
            Sentences { name, classes: classes.keys().cloned().collect(), train: vec![], held_out: vec![] };
        for (text, label) in pairs {
            let number = match kind {
                LabelKind::Classes => classes[&label],
                LabelKind::Regression => {
                    let number: Option<f32> = label.trim().parse().ok().filter(|v: &f32| v.is_finite());
                    number
                        .ok_or_else(|| format!("the label `{label}` is no number; say `--task classes` for classes"))?
                }
            };
            let hash = blake3::hash(text.as_bytes());
            let draw = u32::from_le_bytes([0, 1, 2, 3].map(|i| hash.as_bytes()[i]));
            let part = if f64::from(draw) < held_out * 4_294_967_296.0 {
                &mut sentences.held_out
            } else {
                &mut sentences.train
            };
            part.push(Labelled { text, label: number });
        }
        if sentences.train.is_empty() || sentences.held_out.is_empty() {
            let [train, held] = [sentences.train.len(), sentences.held_out.len()];
            return Err(format!("{train} sentences to train on and {held} held out: neither may be none"));
        }
        Ok(sentences)
    }
}

/// Lines of number, rating and sentence.
fn rated(text: &str, kind: LabelKind) -> Vec<(String, String)> {
    let parts = text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, '\t').skip(1);
        Some((parts.next()?.trim().parse::<f32>().ok()?, parts.next()?.trim().to_string()))
    });
    let labelled = parts.filter_map(|(rating, text)| match kind {
        LabelKind::Regression => Some((text, rating.to_string())),
        // What is rated near 0 is neither.
        LabelKind::Classes if rating.abs() < 1.0 => None,
        LabelKind::Classes => Some((text, if rating > 0.0 { "positive" } else { "negative" }.into())),
    });
    labelled.collect()
}

fn json(line: &str) -> Result<(String, String), String> {
    #[derive(Deserialize)]
    struct Line {
        text: String,
        label: serde_json::Value,
    }
    let Line { text, label } =
        serde_json::from_str(line).map_err(|e| format!("it is no object with `text` and `label`: {e}"))?;
    match label {
        serde_json::Value::String(label) => Ok((text, label)),
        serde_json::Value::Number(_) | serde_json::Value::Bool(_) => Ok((text, label.to_string())),
        other => Err(format!("the label {other} is neither text nor number")),
    }
}

fn tabbed(line: &str) -> Result<(String, String), String> {
    match line.rsplit_once('\t') {
        Some((text, label)) if !text.trim().is_empty() && !label.trim().is_empty() => {
            Ok((text.trim().into(), label.trim().into()))
        }
        _ => Err("write the sentence, a tab and its label".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn open(name: &str, text: &[u8], kind: LabelKind) -> Result<Sentences, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        Sentences::open(path.to_str().unwrap(), kind, 0.25, dir.path(), |_| ()).map_err(|e| e.to_string())
    }

    #[test]
    fn classes_are_numbered_by_name_and_a_text_is_held_out_whatever_stands_around_it() {
        let line = |i: usize| format!("a sentence, number {i}\t{}\n", ["good", "bad", "so so"][i % 3]);
        let all = open("a.tsv", (0..60).map(line).collect::<String>().as_bytes(), LabelKind::Classes).unwrap();
        assert_eq!(all.classes, ["bad", "good", "so so"]);
        assert_eq!(all.train.len() + all.held_out.len(), 60);
        assert!((5..30).contains(&all.held_out.len()), "{}", all.held_out.len());
        let of = |s: &Labelled| (s.text[19..].trim().parse::<usize>().unwrap(), s.label);
        for (i, label) in all.train.iter().chain(&all.held_out).map(of) {
            assert_eq!(label, [1.0, 0.0, 2.0][i % 3]);
        }
        let half =
            open("a.tsv", (0..60).step_by(2).map(line).collect::<String>().as_bytes(), LabelKind::Classes).unwrap();
        assert!(half.held_out.iter().all(|s| all.held_out.contains(s)));
    }

    #[test]
    fn json_lines_hold_texts_and_numbers() {
        let line = |i: usize| format!("{{\"text\": \"t{i}\", \"label\": {}.5}}\n", i);
        let text: String = (0..30).map(line).collect();
        let all = open("a.jsonl", text.as_bytes(), LabelKind::Regression).unwrap();
        assert!(all.classes.is_empty() && all.train.iter().all(|s| format!("t{}", s.label - 0.5) == s.text));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (name, text, kind, wanted) in [
            ("a.tsv", &b"good\t1\n\nno label here\n"[..], LabelKind::Classes, "line 3: write the sentence, a tab"),
            ("a.tsv", b"one\tx\ntwo\tx\n", LabelKind::Classes, "it has 1 of the two classes"),
            ("a.tsv", b"", LabelKind::Classes, "it has 0 of the two classes"),
            ("a.tsv", b"", LabelKind::Regression, "0 sentences to train on"),
            ("a.tsv", b"one\tx\n", LabelKind::Regression, "`x` is no number"),
            ("a.tsv", b"one\tnan\n", LabelKind::Regression, "`nan` is no number"),
            ("a.tsv", b"caf\xe9\t1\n", LabelKind::Classes, "byte 3 is no UTF-8"),
            ("a.jsonl", b"{\"text\": \"a\"}\n", LabelKind::Classes, "line 1: it is no object with `text` and `label`"),
            ("a.jsonl", b"{\"text\": \"a\", \"label\": []}", LabelKind::Classes, "neither text nor number"),
        ] {
            let e = open(name, text, kind).unwrap_err();
            assert!(e.contains(wanted), "{e}");
        }
    }

    #[test]
    fn ratings_near_nought_are_of_no_class() {
        let text = "1\t2.5\tFine .\n2\t-0.9\tMeh .\n3\t-1.0\tBad .\nno line\n";
        let pair = |t: &str, l: &str| (t.to_string(), l.to_string());
        assert_eq!(rated(text, LabelKind::Classes), [pair("Fine .", "positive"), pair("Bad .", "negative")]);
        assert_eq!(rated(text, LabelKind::Regression).len(), 3);
    }
}
