//! Token files: documents of sentences of words' numbers, mapped into memory.
//!
//! ```text
//! "MESHTOK1"  width, vocabulary u32  tokens, sentences, documents u64  vocabulary's and source's BLAKE3   (128 bytes)
//! tokens      `width` bytes each, padded to 8
//! sentences   where each ends, in tokens, u64
//! documents   where each ends, in sentences, u64
//! seal        BLAKE3 of all but the tokens
//! ```
//! All numbers are little-endian. A reader touches the pages of what it reads, so any number of processes may read their
//! own parts of one file.

use super::{DataError, file, format};
use memmap2::Mmap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"MESHTOK1";
const HEAD: usize = 128;
const SEAL: usize = 32;
/// A sentence's tokens at the most, and a document's sentences.
const LONGEST: u32 = 1 << 24;

/// What a file is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Words of the vocabulary: every token is below.
    pub vocabulary: u32,
    /// BLAKE3 of the vocabulary.
    pub words: [u8; 32],
    /// BLAKE3 of what names the source.
    pub source: [u8; 32],
}

impl Origin {
    /// Bytes of a token.
    fn width(&self) -> usize {
        if self.vocabulary <= 1 << 16 { 2 } else { 4 }
    }
}

/// Makes a token file, document by document. What is written stays: a file that is begun again goes on behind its last
/// whole document.
pub struct Writer {
    target: PathBuf,
    part: PathBuf,
    origin: Origin,
    file: BufWriter<File>,
    documents: u64,
}

/// What stands before a document in an unfinished file: sentences, bytes that follow, BLAKE3 of those.
const RECORD: usize = 4 + 8 + 32;

fn part_head(origin: &Origin) -> Vec<u8> {
    [b"MESHPART".as_slice(), &origin.vocabulary.to_le_bytes(), &origin.words, &origin.source].concat()
}

/// The next document of an unfinished file, as the lengths of its sentences and all their tokens; None at the end, or
/// where the file was cut off.
fn record(file: &mut impl Read) -> Option<(Vec<u32>, Vec<u32>, u64)> {
    let mut head = [0; RECORD];
    file.read_exact(&mut head).ok()?;
    let sentences = u32::from_le_bytes(head[..4].try_into().ok()?) as usize;
    let bytes = u64::from_le_bytes(head[4..12].try_into().ok()?);
    if bytes > 4 * (u64::from(LONGEST) + sentences as u64) {
        return None;
    }
    let mut body = Vec::new();
    file.take(bytes).read_to_end(&mut body).ok()?;
    if body.len() as u64 != bytes || blake3::hash(&body).as_bytes() != &head[12..] || body.len() < 4 * sentences {
        return None;
    }
    let mut numbers: Vec<u32> = body.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let tokens = numbers.split_off(sentences);
    let sum: u64 = numbers.iter().map(|n| u64::from(*n)).sum();
    (sum == tokens.len() as u64).then_some((numbers, tokens, RECORD as u64 + bytes))
}

impl Writer {
    /// Begins the file at `target`, or goes on with it.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn open(target: &Path, origin: &Origin) -> Result<Writer, DataError> {
        let part = target.with_extension("part");
        let fail = |e: std::io::Error| file("write", &part, e);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(|e| file("write", folder, e))?;
        }
        let mut opened =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&part).map_err(fail)?;
        let head = part_head(origin);
        let mut found = vec![0; head.len()];
        let same = opened.read_exact(&mut found).is_ok() && found == head;
        let (mut end, mut documents) = (head.len() as u64, 0);
        if same {
            let mut reader = BufReader::new(&mut opened);
            while let Some((_, _, bytes)) = record(&mut reader) {
                (end, documents) = (end + bytes, documents + 1);
            }
        } else {
            opened.rewind().and_then(|()| opened.write_all(&head)).map_err(fail)?;
        }
        // What was cut off is done again.
        opened.set_len(end).and_then(|()| opened.seek(SeekFrom::End(0))).map_err(fail)?;
        let file = BufWriter::new(opened);
        Ok(Writer { target: target.into(), part, origin: origin.clone(), file, documents })
    }

    /// Documents that are written.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// Adds a document. Sentences without tokens are left out, and so is a document without sentences, but it counts.
    ///
    /// # Errors
    /// A token beyond the vocabulary, a document beyond all bounds, a disk that is full.
    pub fn add(&mut self, sentences: &[Vec<u32>]) -> Result<(), DataError> {
        let sentences: Vec<&Vec<u32>> = sentences.iter().filter(|s| !s.is_empty()).collect();
        let tokens: usize = sentences.iter().map(|s| s.len()).sum();
        if tokens > LONGEST as usize {
            return Err(format(&self.target, format!("a document of {tokens} tokens; cut it into smaller ones")));
        }
        if let Some(t) = sentences.iter().flat_map(|s| s.iter()).find(|t| **t >= self.origin.vocabulary) {
            let why = format!("token {t} is beyond the vocabulary of {}", self.origin.vocabulary);
            return Err(format(&self.target, why));
        }
        let lengths = sentences.iter().map(|s| s.len() as u32);
        let all = lengths.chain(sentences.iter().flat_map(|s| s.iter().copied()));
        let body: Vec<u8> = all.flat_map(u32::to_le_bytes).collect();
        let (count, bytes) = ((sentences.len() as u32).to_le_bytes(), (body.len() as u64).to_le_bytes());
        let head = [&count[..], &bytes, blake3::hash(&body).as_bytes()].concat();
        let written = self.file.write_all(&head).and_then(|()| self.file.write_all(&body));
        written.map_err(|e| file("write", &self.part, e))?;
        self.documents += 1;
        Ok(())
    }

    /// Makes sure that what was added stays.
    ///
    /// # Errors
    /// A disk that is full.
    pub fn flush(&mut self) -> Result<(), DataError> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_data()).map_err(|e| file("write", &self.part, e))
    }

    /// Seals the file.
    ///
    /// # Errors
    /// A source without a sentence; a disk that is full.
    pub fn finish(mut self) -> Result<(), DataError> {
        self.flush()?;
        let fail = |e: std::io::Error| file("write", &self.target, e);
        let staging = self.target.with_extension(std::format!("staging-{}", std::process::id()));
        let mut out = BufWriter::new(File::create(&staging).map_err(fail)?);
        out.write_all(&[0; HEAD]).map_err(fail)?;
        let mut part = BufReader::new(File::open(&self.part).map_err(fail)?);
        part.seek(SeekFrom::Start(part_head(&self.origin).len() as u64)).map_err(fail)?;
        let (mut tokens, width) = (0u64, self.origin.width());
        let (mut sentence_ends, mut document_ends) = (Vec::new(), Vec::new());
        while let Some((lengths, words, _)) = record(&mut part) {
            for n in lengths {
                tokens += u64::from(n);
                sentence_ends.push(tokens);
            }
            if document_ends.last().copied().unwrap_or(0) < sentence_ends.len() as u64 {
                document_ends.push(sentence_ends.len() as u64);
            }
            for word in words {
                out.write_all(&word.to_le_bytes()[..width]).map_err(fail)?;
            }
        }
        if sentence_ends.is_empty() {
            let _ = fs::remove_file(&staging);
            return Err(format(&self.target, "there is not one sentence in its source"));
        }
        let bytes = tokens as usize * width;
        out.write_all(&vec![0; bytes.next_multiple_of(8) - bytes]).map_err(fail)?;
        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(MAGIC);
        head.extend((width as u32).to_le_bytes());
        head.extend(self.origin.vocabulary.to_le_bytes());
        for n in [tokens, sentence_ends.len() as u64, document_ends.len() as u64] {
            head.extend(n.to_le_bytes());
        }
        head.extend(self.origin.words);
        head.extend(self.origin.source);
        head.resize(HEAD, 0);
        let index: Vec<u8> = sentence_ends.iter().chain(&document_ends).flat_map(|n| n.to_le_bytes()).collect();
        let seal = blake3::Hasher::new().update(&head).update(&index).finalize();
        let sealed = || -> std::io::Result<()> {
            out.write_all(&index)?;
            out.write_all(seal.as_bytes())?;
            let mut file = out.into_inner().map_err(|e| e.into_error())?;
            file.rewind()?;
            file.write_all(&head)?;
            file.sync_all()?;
            fs::rename(&staging, &self.target)?;
            fs::remove_file(&self.part)
        };
        sealed().map_err(fail)
    }
}

/// A token file.
pub struct Tokens {
    path: PathBuf,
    map: Mmap,
    origin: Origin,
    tokens: usize,
    sentences: usize,
    documents: usize,
}

impl Tokens {
    /// Opens a file and checks its head and its index.
    ///
    /// # Errors
    /// A file that is not there, or is damaged.
    pub fn open(path: &Path) -> Result<Tokens, DataError> {
        let opened = File::open(path).map_err(|e| file("read", path, e))?;
        // SAFETY: the map is only read. A file that another process changes meanwhile changes what is read, as it would
        // with `read`; token files are written beside and renamed, never changed.
        let map = unsafe { Mmap::map(&opened) }.map_err(|e| file("read", path, e))?;
        let damaged = |why: &str| format(path, std::format!("{why}; delete it, and it is made again"));
        let head = map.get(..HEAD).filter(|h| h.starts_with(MAGIC)).ok_or_else(|| damaged("it is no token file"))?;
        let u32_at = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let count = |i: usize| word(head, i).and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
        let hash = |i: usize| <[u8; 32]>::try_from(&head[i..i + 32]).unwrap_or_default();
        let origin = Origin { vocabulary: u32_at(12), words: hash(40), source: hash(72) };
        let (tokens, sentences, documents) = (count(16), count(24), count(32));
        if u32_at(8) as usize != origin.width() {
            return Err(damaged("its head is damaged"));
        }
        let this = Tokens { path: path.into(), origin, tokens, sentences, documents, map };
        let whole = || -> Option<usize> {
            let index = this.sentences.checked_add(this.documents)?.checked_mul(8)?;
            this.index_at()?.checked_add(index)?.checked_add(SEAL)
        };
        if whole() != Some(this.map.len()) {
            return Err(damaged("it was cut short, or its head is damaged"));
        }
        let (index, seal) = (this.index_at().unwrap_or(HEAD), this.map.len() - SEAL);
        let found = blake3::Hasher::new().update(&this.map[..HEAD]).update(&this.map[index..seal]).finalize();
        if found.as_bytes() != &this.map[seal..] {
            return Err(damaged("its head or its index is damaged"));
        }
        // The seal tells damage, not malice: ends must rise up to the counts all the same.
        let rises = |n: usize, end: &dyn Fn(usize) -> usize, last: usize| {
            (0..n).try_fold(0, |before, i| (end(i) > before).then(|| end(i))) == Some(last)
        };
        let sentences_rise = rises(this.sentences, &|s| this.sentence_end(s), this.tokens);
        if this.documents == 0 || !sentences_rise || !rises(this.documents, &|d| this.document_end(d), this.sentences) {
            return Err(damaged("its index is damaged"));
        }
        Ok(this)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was made of.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Tokens, sentences and documents.
    pub fn counts(&self) -> [usize; 3] {
        [self.tokens, self.sentences, self.documents]
    }

    fn index_at(&self) -> Option<usize> {
        self.tokens.checked_mul(self.origin.width())?.checked_next_multiple_of(8)?.checked_add(HEAD)
    }

    fn end(&self, place: usize) -> usize {
        let at = self.index_at().unwrap_or(usize::MAX).saturating_add(place * 8);
        word(&self.map, at).map_or(0, |n| n as usize)
    }

    fn sentence_end(&self, sentence: usize) -> usize {
        self.end(sentence)
    }

    fn document_end(&self, document: usize) -> usize {
        self.end(self.sentences + document)
    }

    /// The sentences of a document.
    ///
    /// # Panics
    /// There are not so many documents.
    pub fn document(&self, document: usize) -> Range<usize> {
        assert!(document < self.documents, "document {document} of {}", self.documents);
        document.checked_sub(1).map_or(0, |d| self.document_end(d))..self.document_end(document)
    }

    /// The tokens' places of a sentence.
    ///
    /// # Panics
    /// There are not so many sentences.
    pub fn sentence(&self, sentence: usize) -> Range<usize> {
        assert!(sentence < self.sentences, "sentence {sentence} of {}", self.sentences);
        sentence.checked_sub(1).map_or(0, |s| self.sentence_end(s))..self.sentence_end(sentence)
    }

    /// The document that a token is in, and its sentence.
    ///
    /// # Panics
    /// There are not so many tokens.
    pub fn place(&self, token: usize) -> (usize, usize) {
        assert!(token < self.tokens, "token {token} of {}", self.tokens);
        let first = |n: usize, end: &dyn Fn(usize) -> usize, at: usize| {
            let (mut low, mut high) = (0, n - 1);
            while low < high {
                let middle = (low + high) / 2;
                if end(middle) > at { high = middle } else { low = middle + 1 }
            }
            low
        };
        let sentence = first(self.sentences, &|s| self.sentence_end(s), token);
        (first(self.documents, &|d| self.document_end(d), sentence), sentence)
    }

    /// Adds tokens, by their places, to a list.
    ///
    /// # Errors
    /// A token beyond the vocabulary: the file is damaged.
    pub fn read(&self, places: Range<usize>, into: &mut Vec<u32>) -> Result<(), DataError> {
        let width = self.origin.width();
        let bytes = self.map.get(HEAD + places.start * width..HEAD + places.end.min(self.tokens) * width);
        let tokens = bytes.unwrap_or_default().chunks_exact(width).map(|b| match *b {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => u32::MAX,
        });
        let from = into.len();
        into.extend(tokens);
        match into[from..].iter().find(|t| **t >= self.origin.vocabulary) {
            Some(t) => Err(format(&self.path, std::format!("it is damaged: token {t} is beyond its vocabulary"))),
            None => Ok(()),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin(vocabulary: u32) -> Origin {
        Origin { vocabulary, words: [7; 32], source: [9; 32] }
    }

    fn make(path: &Path, vocabulary: u32, documents: &[Vec<Vec<u32>>]) {
        let mut writer = Writer::open(path, &origin(vocabulary)).unwrap();
        documents.iter().for_each(|d| writer.add(d).unwrap());
        writer.finish().unwrap();
    }

    fn all(tokens: &Tokens) -> Vec<Vec<Vec<u32>>> {
        let sentence = |s: usize| {
            let mut words = vec![];
            tokens.read(tokens.sentence(s), &mut words).unwrap();
            words
        };
        (0..tokens.counts()[2]).map(|d| tokens.document(d).map(sentence).collect()).collect()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(
            documents in prop::collection::vec(prop::collection::vec(prop::collection::vec(0u32..50_000, 0..9), 0..5), 1..9),
            wide: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.tokens");
            let kept: Vec<Vec<Vec<u32>>> = documents
                .iter()
                .map(|d| d.iter().filter(|s| !s.is_empty()).cloned().collect::<Vec<_>>())
                .filter(|d: &Vec<_>| !d.is_empty())
                .collect();
            prop_assume!(!kept.is_empty());
            make(&path, if wide { 100_000 } else { 50_000 }, &documents);
            let tokens = Tokens::open(&path).unwrap();
            prop_assert_eq!(all(&tokens), kept);
            for t in 0..tokens.counts()[0] {
                let (d, s) = tokens.place(t);
                prop_assert!(tokens.document(d).contains(&s) && tokens.sentence(s).contains(&t));
            }
        }
    }

    #[test]
    fn a_file_that_was_begun_goes_on_behind_its_last_whole_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let documents: Vec<Vec<Vec<u32>>> = (0..4).map(|d| vec![vec![d, 1, 2], vec![d]]).collect();
        for cut in 0..60 {
            let mut writer = Writer::open(&path, &origin(100)).unwrap();
            documents[..3].iter().for_each(|d| writer.add(d).unwrap());
            writer.flush().unwrap();
            drop(writer);
            let part = path.with_extension("part");
            let length = fs::metadata(&part).unwrap().len();
            OpenOptions::new().write(true).open(&part).unwrap().set_len(length - cut).unwrap();
            let mut writer = Writer::open(&path, &origin(100)).unwrap();
            let done = writer.documents() as usize;
            assert_eq!(done, if cut == 0 { 3 } else { 2 });
            documents[done..].iter().for_each(|d| writer.add(d).unwrap());
            writer.finish().unwrap();
            assert_eq!(all(&Tokens::open(&path).unwrap()), documents);
        }
        // Another source begins anew.
        let mut writer = Writer::open(&path, &origin(100)).unwrap();
        writer.add(&documents[0]).unwrap();
        drop(writer);
        assert_eq!(Writer::open(&path, &origin(101)).unwrap().documents(), 0);
    }

    #[test]
    fn damage_is_told_and_never_read_as_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let documents: Vec<Vec<Vec<u32>>> = (0..5).map(|d| vec![vec![d, 3, 4], vec![5; d as usize + 1]]).collect();
        make(&path, 10, &documents);
        let good = fs::read(&path).unwrap();
        let whole = all(&Tokens::open(&path).unwrap());
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(Tokens::open(&path).is_err(), "cut to {length}");
        }
        let tokens: usize = documents.iter().flatten().map(Vec::len).sum();
        let text = HEAD..HEAD + tokens * 2;
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            fs::write(&path, &bad).unwrap();
            match Tokens::open(&path) {
                // Words are not sealed; one beyond the vocabulary is found when it is read, one within is another word.
                Ok(t) => {
                    let mut words = vec![];
                    assert!(text.contains(&at) || at >= text.end && at < text.end.next_multiple_of(8), "byte {at}");
                    assert!(t.read(0..tokens, &mut words).is_err() || at >= text.end);
                }
                Err(e) => assert!(e.to_string().starts_with("D0002: ") && !text.contains(&at), "{e}"),
            }
        }
        // Sealed, and wrong all the same.
        let lie = |head: &dyn Fn(&mut Vec<u8>)| {
            let mut bad = good.clone();
            head(&mut bad);
            let (index, end) = ((HEAD + tokens * 2).next_multiple_of(8), bad.len() - SEAL);
            let seal = blake3::Hasher::new().update(&bad[..HEAD]).update(&bad[index..end]).finalize();
            bad[end..].copy_from_slice(seal.as_bytes());
            fs::write(&path, &bad).unwrap();
            assert!(Tokens::open(&path).is_err());
        };
        lie(&|b| b[16..24].copy_from_slice(&u64::MAX.to_le_bytes()));
        lie(&|b| b[24..32].copy_from_slice(&(u64::MAX / 8).to_le_bytes()));
        lie(&|b| {
            let index = (HEAD + tokens * 2).next_multiple_of(8);
            b[index..index + 8].copy_from_slice(&1000u64.to_le_bytes());
        });
        fs::write(&path, &good).unwrap();
        assert_eq!(all(&Tokens::open(&path).unwrap()), whole);
        let empty = dir.path().join("b.tokens");
        let mut writer = Writer::open(&empty, &origin(10)).unwrap();
        writer.add(&[vec![]]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("not one sentence"));
        assert!(Writer::open(&empty, &origin(10)).unwrap().add(&[vec![10]]).is_err());
    }
}
