//! The vocabulary that a run was begun with, kept in its folder: with another one every id would mean another word.

use super::wordpiece::Vocabulary;
use crate::run::Failed;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use worker::data::DataError;

/// The vocabulary in a run folder.
pub const VOCABULARY_FILE: &str = "vocabulary.json";

/// A vocabulary that is not the run's own.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "U0011: the vocabulary {} is not the one that the run in {} was begun with: {differs}\n  help: give the run's own with \
     --vocab, its words in their order as in {}/{VOCABULARY_FILE}; or begin another run with --out",
    path.display(), folder.display(), folder.display()
)]
pub struct OtherVocabulary {
    /// The one in use.
    pub path: PathBuf,
    /// The run folder.
    pub folder: PathBuf,
    /// In what.
    pub differs: Difference,
}

/// What first differs between a run's vocabulary and the one in use.
#[derive(Debug, PartialEq, Eq)]
pub enum Difference {
    /// How many words there are.
    Size {
        /// In the run's.
        run: usize,
        /// In the one in use.
        given: usize,
    },
    /// What an id means; None is an id without a word.
    Word {
        /// The lowest such id.
        id: usize,
        /// In the run's.
        run: Option<String>,
        /// In the one in use.
        given: Option<String>,
    },
    /// The words are the same.
    Cut,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |w: &Option<String>| w.as_ref().map_or("no word".to_string(), |w| format!("`{w}`"));
        match self {
            Difference::Size { run, given } => write!(f, "it has {given} words, and the run's {run}"),
            Difference::Word { id, run, given } => {
                write!(f, "id {id} is {} in it, and {} in the run's", word(given), word(run))
            }
            Difference::Cut => {
                write!(f, "the words are the same, but text is cut into them otherwise: capitals, accents")
            }
        }
    }
}

/// Why a vocabulary is not to be used with a run.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// It is another one.
    #[error(transparent)]
    Other(#[from] OtherVocabulary),
    /// The file in the run folder.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl From<KeptError> for Failed {
    fn from(e: KeptError) -> Failed {
        match e {
            KeptError::Other(error) => Failed::Own { error: error.into(), exit_code: 2 },
            KeptError::Data(e) => e.into(),
        }
    }
}

/// What is in the file: the words by id, and [`Vocabulary::hash`], which also tells how text is cut.
#[derive(Serialize, Deserialize)]
struct Kept {
    hash: String,
    words: Vec<Option<String>>,
}

impl Kept {
    fn of(vocabulary: &Vocabulary) -> Kept {
        Kept { hash: blake3::Hash::from_bytes(vocabulary.hash).to_string(), words: vocabulary.words() }
    }
}

/// Checks that a vocabulary is that of the run in a folder; a folder that keeps none says nothing against any.
///
/// # Errors
/// Another vocabulary; a file that cannot be read or is none.
pub fn check(folder: &Path, vocabulary: &Vocabulary) -> Result<(), KeptError> {
    let path = folder.join(VOCABULARY_FILE);
    let text = match fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(DataError::File { what: "read", path, why: e.to_string() }.into()),
        Ok(text) => text,
    };
    let run: Kept = serde_json::from_slice(&text)
        .map_err(|e| DataError::Format { path, why: format!("it is no vocabulary of a run: {e}") })?;
    let given = Kept::of(vocabulary);
    if run.hash == given.hash {
        return Ok(());
    }
    let differs = if run.words.len() != given.words.len() {
        Difference::Size { run: run.words.len(), given: given.words.len() }
    } else {
        let mut pairs = run.words.into_iter().zip(given.words).enumerate();
        let unlike = pairs.find(|(_, (run, given))| run != given);
        unlike.map_or(Difference::Cut, |(id, (run, given))| Difference::Word { id, run, given })
    };
    Err(OtherVocabulary { path: vocabulary.path.clone(), folder: folder.into(), differs }.into())
}

/// Keeps a vocabulary in a run folder. The file is whole or not there.
///
/// # Errors
/// What cannot be written.
pub fn keep(folder: &Path, vocabulary: &Vocabulary) -> Result<(), DataError> {
    let path = folder.join(VOCABULARY_FILE);
    let part = path.with_extension("json.part");
    let text = serde_json::to_vec(&Kept::of(vocabulary)).expect("words are texts");
    let written = fs::write(&part, text).and_then(|()| fs::rename(&part, &path));
    written.map_err(|e| DataError::File { what: "write", path, why: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::super::wordpiece::tiny_vocabulary;
    use super::*;
    use tokenizers::Tokenizer;
    use tokenizers::models::wordpiece::WordPiece;
    use tokenizers::normalizers::BertNormalizer;
    use tokenizers::pre_tokenizers::bert::BertPreTokenizer;

    /// What differs between the tiny vocabulary and a changed one.
    fn difference(change: impl Fn(&str) -> String) -> Result<(), KeptError> {
        let [run, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let path = tiny_vocabulary(other.path());
        keep(run.path(), &Vocabulary::open(&path).unwrap()).unwrap();
        fs::write(&path, change(&fs::read_to_string(&path).unwrap())).unwrap();
        check(run.path(), &Vocabulary::open(&path).unwrap())
    }

    fn differs(change: impl Fn(&str) -> String) -> Difference {
        match difference(change).unwrap_err() {
            KeptError::Other(other) => other.differs,
            KeptError::Data(e) => panic!("{e}"),
        }
    }

    #[test]
    fn a_vocabulary_is_the_runs_if_every_id_means_the_same_word() {
        difference(str::to_string).unwrap();
        let size = differs(|words| format!("{words}more\n"));
        assert_eq!(size.to_string(), "it has 77 words, and the run's 76");
        let word = differs(|words| words.replace("\nthe\nof\n", "\nof\nthe\n"));
        assert_eq!(word, Difference::Word { id: 64, run: Some("the".into()), given: Some("of".into()) });
        assert_eq!(word.to_string(), "id 64 is `of` in it, and `the` in the run's");
    }

    #[test]
    fn the_same_words_with_capitals_are_another_vocabulary() {
        let dir = tempfile::tempdir().unwrap();
        let lower = Vocabulary::open(&tiny_vocabulary(dir.path())).unwrap();
        keep(dir.path(), &lower).unwrap();
        let path = dir.path().join("tokenizer.json");
        for (lowercase, same) in [(true, true), (false, false)] {
            let pieces = WordPiece::from_file(lower.path.to_str().unwrap()).unk_token("[UNK]".into()).build().unwrap();
            let mut tokenizer = Tokenizer::new(pieces);
            tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, lowercase))).unwrap();
            tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
            tokenizer.save(&path, false).unwrap();
            let checked = check(dir.path(), &Vocabulary::open(&path).unwrap());
            match checked {
                Ok(()) => assert!(same),
                Err(KeptError::Other(other)) => assert_eq!((other.differs, same), (Difference::Cut, false)),
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn a_folder_without_one_takes_any_and_a_damaged_one_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let vocabulary = Vocabulary::open(&tiny_vocabulary(dir.path())).unwrap();
        check(dir.path(), &vocabulary).unwrap();
        fs::write(dir.path().join(VOCABULARY_FILE), "{\"words\": [").unwrap();
        let e = check(dir.path(), &vocabulary).unwrap_err().to_string();
        assert!(e.contains("D0002") && e.contains("it is no vocabulary of a run"), "{e}");
    }
}
