//! A corpus as a token file: made once, kept in the cache, gone on with after a stop.

use super::corpus::Corpus;
use super::wordpiece::Vocabulary;
use coordinator::interrupt;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use worker::data::DataError;
use worker::data::tokens::{Origin, Tokens, Writer};

/// Documents that are cut into words at a time.
const CHUNK: usize = 64;
/// Time between two makings sure.
const FLUSH: Duration = Duration::from_secs(5);

/// What is said, at times, where there is no terminal.
const REPORT: Duration = Duration::from_secs(10);

/// The token file of a corpus in the cache, made or gone on with if it is not there. None if the process was asked to stop:
/// what is done so far stays.
///
/// # Errors
/// Text that is none; a corpus without a sentence; a disk that is full.
pub fn prepare(corpus: &Corpus, vocabulary: &Vocabulary, cache: &Path) -> Result<Option<Tokens>, DataError> {
    let origin = Origin { vocabulary: vocabulary.size as u32, words: vocabulary.hash, source: corpus.identity };
    let path = file_of(&origin, cache);
    if let Ok(tokens) = Tokens::open(&path)
        && *tokens.origin() == origin
    {
        return Ok(Some(tokens));
    }
    let mut writer = Writer::open(&path, &origin)?;
    let done = writer.documents();
    let mut progress = Progress::new(corpus, done);
    let mut documents = corpus.documents();
    for _ in 0..done {
        if let Some(read) = documents.next() {
            progress.read(read?.1, 0);
        }
    }
    let mut flushed = Instant::now();
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        for document in documents.by_ref().take(CHUNK) {
            let (sentences, bytes) = document?;
            progress.read(bytes, 1);
            chunk.push(sentences);
        }
        if chunk.is_empty() {
            break;
        }
        for document in encode(vocabulary, &chunk)? {
            writer.add(&document)?;
        }
        if interrupt::asked() {
            writer.flush()?;
            return Ok(None);
        }
        if flushed.elapsed() > FLUSH {
            writer.flush()?;
            flushed = Instant::now();
        }
    }
    progress.finish();
    writer.finish().map_err(|e| match e {
        DataError::Format { why, .. } => DataError::Format { path: corpus.name.clone().into(), why },
        other => other,
    })?;
    Tokens::open(&path).map(Some)
}

fn file_of(origin: &Origin, cache: &Path) -> PathBuf {
    let hash = blake3::Hasher::new().update(&origin.words).update(&origin.source).finalize().to_hex();
    cache.join(format!("{}.tokens", &hash[..24]))
}

/// Cuts the sentences of documents into words, on all cores; in order.
fn encode(vocabulary: &Vocabulary, documents: &[Vec<String>]) -> Result<Vec<Vec<Vec<u32>>>, DataError> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(documents.len().max(1));
    let share = documents.len().div_ceil(threads).max(1);
    let one = |document: &Vec<String>| document.iter().map(|s| vocabulary.encode(s)).collect::<Result<Vec<_>, _>>();
    std::thread::scope(|s| {
        let parts: Vec<_> = documents
            .chunks(share)
            .map(|part| s.spawn(move || part.iter().map(one).collect::<Result<Vec<_>, _>>()))
            .collect();
        let mut all = Vec::with_capacity(documents.len());
        for part in parts {
            all.extend(part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })
}

/// How far it is: a bar on a terminal, lines otherwise.
struct Progress {
    bar: Option<ProgressBar>,
    bytes: u64,
    read: u64,
    documents: u64,
    told: Instant,
}

impl Progress {
    fn new(corpus: &Corpus, done: u64) -> Progress {
        let again = if done > 0 { format!(", {done} documents of it done before") } else { String::new() };
        eprintln!("cutting {} ({}) into words{again}", corpus.name, HumanBytes(corpus.bytes));
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {msg} documents, {eta} left",
            );
            ProgressBar::new(corpus.bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Progress { bar, bytes: corpus.bytes, read: 0, documents: done, told: Instant::now() }
    }

    fn read(&mut self, bytes: u64, documents: u64) {
        (self.read, self.documents) = (self.read + bytes, self.documents + documents);
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.read);
                bar.set_message(self.documents.to_string());
            }
            None if self.told.elapsed() > REPORT => {
                let share = 100 * self.read / self.bytes.max(1);
                eprintln!("{share} % of {} cut, {} documents", HumanBytes(self.bytes), self.documents);
                self.told = Instant::now();
            }
            None => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::wordpiece::tiny_vocabulary;

    #[test]
    fn a_corpus_is_cut_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("a.txt");
        let documents: Vec<String> = (0..200).map(|d| format!("The jury said {d}. It worked.\n")).collect();
        std::fs::write(&text, documents.join("\n")).unwrap();
        let corpus = Corpus::open(text.to_str().unwrap(), dir.path(), |_| {}).unwrap();
        let vocabulary = Vocabulary::open(&tiny_vocabulary(dir.path())).unwrap();
        let tokens = prepare(&corpus, &vocabulary, dir.path()).unwrap().unwrap();
        assert_eq!(tokens.counts()[1..], [400, 200]);
        let mut words = vec![];
        tokens.read(tokens.sentence(1), &mut words).unwrap();
        assert_eq!(words, vocabulary.encode("It worked.").unwrap());
        let made = std::fs::metadata(tokens.path()).unwrap().modified().unwrap();
        let again = prepare(&corpus, &vocabulary, dir.path()).unwrap().unwrap();
        assert_eq!(std::fs::metadata(again.path()).unwrap().modified().unwrap(), made);
        let empty = dir.path().join("empty.txt");
        std::fs::write(&empty, "\n \n").unwrap();
        let corpus = Corpus::open(empty.to_str().unwrap(), dir.path(), |_| {}).unwrap();
        let e = prepare(&corpus, &vocabulary, dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("empty.txt is not usable: there is not one sentence"), "{e}");
    }
}
