//! Text as numbers of a vocabulary: WordPiece (Schuster and Nakajima 2012; Devlin et al. 2019).

use crate::bert::dropping::Specials;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use worker::data::DataError;

/// A vocabulary, and how text is cut into its words.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// Where it comes from.
    pub path: PathBuf,
    /// Words; every number is below.
    pub size: usize,
    /// BLAKE3 of its words in order and of how text is cut.
    pub hash: [u8; 32],
    /// Words with a place of their own.
    pub specials: Specials,
    /// By number: whether it goes on with the word before it, as `##ing` does.
    pub goes_on: Vec<bool>,
}

impl Vocabulary {
    /// Reads tokenizer.json, or vocab.txt (a word a line; lower case, accents taken off), or a folder with either.
    ///
    /// # Errors
    /// A file that is neither; a vocabulary without `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]` or `[MASK]`.
    pub fn open(path: &Path) -> Result<Vocabulary, DataError> {
        if path.is_dir() {
            let found = ["tokenizer.json", "vocab.txt"].map(|n| path.join(n)).into_iter().find(|p| p.exists());
            let why = "there is neither tokenizer.json nor vocab.txt in it";
            return Vocabulary::open(&found.ok_or_else(|| unusable(path, why))?);
        }
        std::fs::metadata(path).map_err(|e| DataError::File { what: "read", path: path.into(), why: e.to_string() })?;
        let wrong = |e: tokenizers::Error| unusable(path, format!("it is no vocabulary: {e}"));
        let tokenizer = if path.extension().is_some_and(|e| e == "json") {
            let mut tokenizer = Tokenizer::from_file(path).map_err(wrong)?;
            // How long and how padded is not the vocabulary's business here.
            tokenizer.with_padding(None).with_truncation(None).map_err(wrong)?;
            tokenizer
        } else {
            let name = path.to_str().ok_or_else(|| unusable(path, "its name is no UTF-8"))?;
            let pieces = WordPiece::from_file(name).unk_token("[UNK]".into()).max_input_chars_per_word(100).build();
            let mut tokenizer = Tokenizer::new(pieces.map_err(wrong)?);
            tokenizer.with_normalizer(Some(BertNormalizer::default())).map_err(wrong)?;
            tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
            tokenizer
        };
        let mut words: Vec<(String, u32)> = tokenizer.get_vocab(true).into_iter().collect();
        words.sort_by_key(|(_, id)| *id);
        let size = words.last().map_or(0, |(_, id)| *id as usize + 1);
        if size > 1 << 24 {
            return Err(unusable(path, format!("a vocabulary of {size} words")));
        }
        let mut goes_on = vec![false; size];
        let mut hasher = blake3::Hasher::new();
        for (word, id) in &words {
            goes_on[*id as usize] = word.starts_with("##");
            hasher.update(format!("{id} {word}\n").as_bytes());
        }
        // The same words are cut otherwise with and without capitals.
        let probe = tokenizer.encode("Déjà VU, naïve 中国's", false).map_err(wrong)?;
        hasher.update(format!("{:?}", probe.get_ids()).as_bytes());
        let id = |word: &str| {
            let missing = || unusable(path, format!("the vocabulary has no `{word}`; BERT needs it"));
            tokenizer.token_to_id(word).ok_or_else(missing)
        };
        let kept = [id("[UNK]")?, id("[CLS]")?, id("[SEP]")?, id("[MASK]")?];
        let specials = Specials { pad: id("[PAD]")?, kept };
        let hash = *hasher.finalize().as_bytes();
        Ok(Vocabulary { path: path.into(), size, hash, specials, goes_on, tokenizer })
    }

    /// Its words by number; None for a number without one.
    pub fn words(&self) -> Vec<Option<String>> {
        (0..self.size as u32).map(|id| self.tokenizer.id_to_token(id)).collect()
    }

    /// The numbers of a text's words, without `[CLS]` and `[SEP]`.
    ///
    /// # Errors
    /// A text that cannot be cut.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoded = self.tokenizer.encode_fast(text, false).map_err(|e| unusable(&self.path, e.to_string()))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// `[CLS]`.
    pub fn begin(&self) -> u32 {
        self.specials.kept[1]
    }

    /// `[SEP]`.
    pub fn end(&self) -> u32 {
        self.specials.kept[2]
    }

    /// `[MASK]`.
    pub fn mask(&self) -> u32 {
        self.specials.kept[3]
    }
}

fn unusable(path: &Path, why: impl Into<String>) -> DataError {
    DataError::Format { path: path.into(), why: why.into() }
}

/// A small vocabulary in a file, for tests: the special words, letters, and some words and pieces.
#[doc(hidden)]
pub fn tiny_vocabulary(folder: &Path) -> PathBuf {
    let mut words: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(String::from).to_vec();
    words.extend(('a'..='z').map(String::from));
    words.extend(('a'..='z').map(|c| format!("##{c}")));
    words.extend(['.', ',', '!', '?', '"', '\'', '-'].map(String::from));
    let more = ["the", "of", "and", "jury", "said", "elect", "##ion", "##ed", "##ing", "city", "work", "play"];
    words.extend(more.map(String::from));
    let path = folder.join("vocab.txt");
    std::fs::write(&path, words.join("\n") + "\n").expect("a folder of the test's own");
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_into_the_longest_pieces_and_lower_case_without_accents() {
        let dir = tempfile::tempdir().unwrap();
        let v = Vocabulary::open(&tiny_vocabulary(dir.path())).unwrap();
        assert_eq!(v.specials, Specials { pad: 0, kept: [1, 2, 3, 4] });
        let id = |w: &str| v.tokenizer.token_to_id(w).unwrap();
        assert_eq!(v.encode("The Élection, played").unwrap(), ["the", "elect", "##ion", ",", "play", "##ed"].map(id));
        assert_eq!(v.encode("中").unwrap(), [1]);
        assert!(v.goes_on[id("##ion") as usize] && !v.goes_on[id("elect") as usize]);
        assert_eq!(Vocabulary::open(dir.path()).unwrap().hash, v.hash);
    }

    #[test]
    fn a_vocabulary_without_what_bert_needs_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vocab.txt");
        std::fs::write(&path, "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n").unwrap();
        let e = Vocabulary::open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("the vocabulary has no `[MASK]`"), "{e}");
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, "{\"not\": 1}").unwrap();
        assert!(Vocabulary::open(&path).map(|_| ()).unwrap_err().to_string().contains("it is no vocabulary"));
        assert!(Vocabulary::open(&dir.path().join("none")).is_err());
    }
}
