//! Examples of BERT's pretraining out of a token file: pairs of text with masked words.
//!
//! An example is a function of the seed and of its number, so the text and the mask of step n are the same on every
//! machine and after every restart, and every pass over the text masks other words.

use super::wordpiece::Vocabulary;
use mesh::rng::{Stream, key_of};
use ndarray::{Array1, Array2};
use std::ops::Range;
use std::sync::Arc;
use worker::data::DataError;
use worker::data::tokens::Tokens;

/// Share of the words that are masked.
const MASKED: f64 = 0.15;
/// Of those: what becomes `[MASK]`, and what becomes that or any word.
const AS_MASK: f32 = 0.8;
const AS_MASK_OR_ANY: f32 = 0.9;
/// Special words of a pair.
const SPECIAL: usize = 3;
/// Tokens that are counted for the unigram entropy at the most.
const COUNTED: usize = 20_000_000;

/// Which documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Those to train on: examples are drawn at random.
    Train,
    /// Those held out: examples go through them in order, each part of the text once, and are the same for every seed.
    HeldOut,
}

/// How examples are made.
#[derive(Clone, Debug)]
pub struct SamplerOptions {
    /// Tokens of an example.
    pub seq: usize,
    /// Masked words of it at the most.
    pub predictions: usize,
    /// Whether all pieces of a word are masked together.
    pub whole_words: bool,
    /// Whether examples are pairs, half of which do not belong together.
    pub pairs: bool,
    /// Seed of the run.
    pub seed: u64,
    /// A document is held out with this probability.
    pub held_out: f64,
}

/// Examples as arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[batch, seq]`, with masks.
    pub tokens: Array2<i32>,
    /// `[batch, seq]`: 1 in the second text.
    pub segments: Array2<i32>,
    /// `[batch]`: what is behind is padding.
    pub lengths: Array1<i32>,
    /// `[batch, prediction]`: places of masked words, in ascending order.
    pub positions: Array2<i32>,
    /// `[batch, prediction]`: the words that were there.
    pub targets: Array2<i32>,
    /// `[batch, prediction]`: 0 where there are no more.
    pub weights: Array2<f32>,
    /// `[batch]`: 0 if the second text goes on from the first one, 1 if it is any other.
    pub next: Array1<i32>,
}

/// Makes examples of one part of a token file.
pub struct Sampler {
    tokens: Arc<Tokens>,
    vocabulary: Arc<Vocabulary>,
    options: SamplerOptions,
    split: Split,
    /// The documents of the split.
    documents: Vec<usize>,
    /// Of what is held out: where each example begins, as (document, sentence).
    starts: Vec<(usize, usize)>,
}

/// Draws, one after the other, that belong to an example.
struct Draws {
    stream: Stream,
    next: u64,
}

impl Draws {
    fn new(seed: u64, what: &str, id: u64) -> Draws {
        let key = key_of(what) ^ (id >> 32) as u32;
        Draws { stream: Stream { seed, step: id as u32, key }, next: 0 }
    }
    /// In [0, 1).
    fn unit(&mut self) -> f32 {
        self.next += 1;
        self.stream.uniform(self.next)
    }
    /// In `0 .. n`.
    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        let bits = u64::from(self.stream.bits(2 * self.next)) << 32 | u64::from(self.stream.bits(2 * self.next + 1));
        ((u128::from(bits) * n as u128) >> 64) as usize
    }
}

/// Whether a document is held out: a function of its number alone.
fn is_held_out(document: usize, share: f64) -> bool {
    let stream = Stream { seed: 0, step: document as u32, key: key_of("held out") };
    f64::from(stream.uniform(document as u64 >> 32)) < share
}

impl Sampler {
    /// Examples of the documents of a split.
    ///
    /// # Errors
    /// A token file of another vocabulary; text with too few documents.
    pub fn new(
        tokens: Arc<Tokens>,
        vocabulary: Arc<Vocabulary>,
        split: Split,
        options: SamplerOptions,
    ) -> Result<Sampler, DataError> {
        let unusable = |why: String| DataError::Format { path: tokens.path().into(), why };
        let origin = tokens.origin();
        if origin.words != vocabulary.hash || origin.vocabulary as usize != vocabulary.size {
            let short = |hash: &[u8; 32]| hash.iter().take(4).map(|b| format!("{b:02x}")).collect::<String>();
            return Err(unusable(format!(
                "it was made with a vocabulary of {} words ({}), and {} has {} ({}); give that vocabulary, or let the text \
                 be cut again",
                origin.vocabulary,
                short(&origin.words),
                vocabulary.path.display(),
                vocabulary.size,
                short(&vocabulary.hash)
            )));
        }
        let all = tokens.counts()[2];
        let mut held_out: Vec<usize> = (0..all).filter(|d| is_held_out(*d, options.held_out)).collect();
        if held_out.is_empty() || held_out.len() == all {
            held_out = vec![all - 1];
        }
        let train: Vec<usize> = (0..all).filter(|d| held_out.binary_search(d).is_err()).collect();
        let documents = if split == Split::Train { train } else { held_out };
        let least = if options.pairs && split == Split::Train { 2 } else { 1 };
        if documents.len() < least {
            return Err(unusable(format!(
                "text of {all} document{} is too little to train on and to hold some out; empty lines stand between \
                 documents",
                if all == 1 { "" } else { "s" }
            )));
        }
        let mut this = Sampler { tokens, vocabulary, options, split, documents, starts: vec![] };
        if split == Split::HeldOut {
            this.starts = this.cut();
        }
        Ok(this)
    }

    /// Words of text in an example.
    fn room(&self) -> usize {
        self.options.seq.saturating_sub(if self.options.pairs { SPECIAL } else { SPECIAL - 1 }).max(1)
    }

    /// Where examples begin that follow each other.
    fn cut(&self) -> Vec<(usize, usize)> {
        let mut starts = Vec::new();
        for &d in &self.documents {
            let mut length = usize::MAX;
            for s in self.tokens.document(d) {
                if length >= self.room() {
                    starts.push((d, s));
                    length = 0;
                }
                length += self.tokens.sentence(s).len();
            }
        }
        starts
    }

    /// Examples of what is held out; without end in training.
    pub fn len(&self) -> u64 {
        if self.split == Split::HeldOut { self.starts.len() as u64 } else { u64::MAX }
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Documents of the split.
    pub fn documents(&self) -> usize {
        self.documents.len()
    }

    /// A document and a sentence of it, each token as likely as any other.
    fn draw_place(&self, draws: &mut Draws) -> (usize, usize) {
        for _ in 0..64 {
            let place = self.tokens.place(draws.below(self.tokens.counts()[0]));
            if self.documents.binary_search(&place.0).is_ok() {
                return place;
            }
        }
        // Few tokens are of this split.
        let d = self.documents[draws.below(self.documents.len())];
        let sentences = self.tokens.document(d);
        (d, sentences.start + draws.below(sentences.len()))
    }

    /// Sentences of a document from one on, until they fill an example.
    fn fill(&self, (document, first): (usize, usize), room: usize) -> Result<Vec<Vec<u32>>, DataError> {
        let (mut sentences, mut length) = (Vec::new(), 0);
        for s in first..self.tokens.document(document).end {
            if length >= room {
                break;
            }
            let mut words = Vec::new();
            self.tokens.read(self.tokens.sentence(s), &mut words)?;
            length += words.len();
            sentences.push(words);
        }
        Ok(sentences)
    }

    /// The two texts of an example, and whether the second one is any other. The second one is empty without pairs.
    fn texts(&self, id: u64, draws: &mut Draws) -> Result<(Vec<u32>, Vec<u32>, bool), DataError> {
        let room = self.room();
        let start = match self.split {
            Split::Train => self.draw_place(draws),
            Split::HeldOut => self.starts[(id % self.starts.len() as u64) as usize],
        };
        let mut sentences = self.fill(start, room)?;
        if !self.options.pairs {
            let mut text = sentences.concat();
            text.truncate(room);
            return Ok((text, vec![], false));
        }
        let ends = if sentences.len() > 1 { 1 + draws.below(sentences.len() - 1) } else { 1 };
        let other = (draws.unit() < 0.5 || sentences.len() == 1) && self.documents.len() > 1;
        let rest = sentences.split_off(ends);
        let (mut a, mut b) = (sentences.concat(), rest.concat());
        if other {
            let mut place = self.draw_place(draws);
            for _ in 0..16 {
                if place.0 != start.0 {
                    break;
                }
                place = self.draw_place(draws);
            }
            b = self.fill(place, room.saturating_sub(a.len()).max(1))?.concat();
        }
        // The longer one loses its first or its last word, until both fit.
        while a.len() + b.len() > room {
            let longer = if a.len() > b.len() { &mut a } else { &mut b };
            if draws.unit() < 0.5 {
                longer.remove(0);
            } else {
                longer.pop();
            }
        }
        Ok((a, b, other))
    }

    /// The examples of those numbers.
    ///
    /// # Errors
    /// A token file that is damaged.
    pub fn batch(&self, ids: Range<u64>) -> Result<Batch, DataError> {
        let (n, seq, predictions) = ((ids.end - ids.start) as usize, self.options.seq, self.options.predictions);
        let mut batch = Batch {
            tokens: Array2::from_elem((n, seq), self.vocabulary.specials.pad as i32),
            segments: Array2::zeros((n, seq)),
            lengths: Array1::zeros(n),
            positions: Array2::zeros((n, predictions)),
            targets: Array2::zeros((n, predictions)),
            weights: Array2::zeros((n, predictions)),
            next: Array1::zeros(n),
        };
        for (row, id) in ids.enumerate() {
            let seed = if self.split == Split::Train { self.options.seed } else { 0 };
            let mut draws = Draws::new(seed, "text", id);
            let (a, b, other) = self.texts(id, &mut draws)?;
            let mut words = vec![self.vocabulary.begin()];
            words.extend(&a);
            words.push(self.vocabulary.end());
            let second = words.len();
            if self.options.pairs {
                words.extend(&b);
                words.push(self.vocabulary.end());
            }
            batch.next[row] = i32::from(other);
            batch.lengths[row] = words.len() as i32;
            (second..words.len()).for_each(|i| batch.segments[[row, i]] = 1);
            let mut draws = Draws::new(seed, "masks", id);
            for (p, place) in self.masked(&words, &mut draws).into_iter().enumerate() {
                batch.positions[[row, p]] = place as i32;
                batch.targets[[row, p]] = words[place] as i32;
                batch.weights[[row, p]] = 1.0;
                let how = draws.unit();
                if how < AS_MASK {
                    words[place] = self.vocabulary.mask();
                } else if how < AS_MASK_OR_ANY {
                    words[place] = draws.below(self.vocabulary.size) as u32;
                }
            }
            words.iter().enumerate().for_each(|(i, w)| batch.tokens[[row, i]] = *w as i32);
        }
        Ok(batch)
    }

    /// Which places of an example are masked, in ascending order.
    fn masked(&self, words: &[u32], draws: &mut Draws) -> Vec<usize> {
        let special = |w: u32| w == self.vocabulary.begin() || w == self.vocabulary.end();
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (i, word) in words.iter().enumerate().filter(|(_, w)| !special(**w)) {
            let goes_on = self.options.whole_words && self.vocabulary.goes_on.get(*word as usize) == Some(&true);
            match groups.last_mut() {
                Some(group) if goes_on && group.last() == Some(&(i - 1)) => group.push(i),
                _ => groups.push(vec![i]),
            }
        }
        let most = ((words.len() as f64 * MASKED).round() as usize).clamp(1, self.options.predictions.max(1));
        let mut chosen = Vec::with_capacity(most);
        for i in 0..groups.len() {
            if chosen.len() >= most {
                break;
            }
            let other = i + draws.below(groups.len() - i);
            groups.swap(i, other);
            if chosen.len() + groups[i].len() <= most {
                chosen.extend(&groups[i]);
            }
        }
        chosen.sort_unstable();
        chosen
    }

    /// What a model that knows only how often each word is in this text would lose on a word of `other`, in nats: the
    /// cross-entropy of unigrams, each counted once more than it is there.
    ///
    /// # Errors
    /// A token file that is damaged.
    pub fn unigram_entropy(&self, other: &Sampler) -> Result<f64, DataError> {
        let count = |sampler: &Sampler| {
            let (mut counts, mut words) = (vec![0u64; self.vocabulary.size], Vec::new());
            let mut read = 0;
            for &d in &sampler.documents {
                let sentences = sampler.tokens.document(d);
                let first = sampler.tokens.sentence(sentences.start).start;
                let places = first..sampler.tokens.sentence(sentences.end - 1).end;
                words.clear();
                sampler.tokens.read(places, &mut words)?;
                words.iter().for_each(|w| counts[*w as usize] += 1);
                read += words.len();
                if read > COUNTED {
                    break;
                }
            }
            Ok::<_, DataError>(counts)
        };
        let (own, other) = (count(self)?, count(other)?);
        let all: u64 = own.iter().map(|c| c + 1).sum();
        let tokens: u64 = other.iter().sum();
        let loss = |(o, n): (&u64, &u64)| *n as f64 * (all as f64 / (*o + 1) as f64).ln();
        Ok(own.iter().zip(&other).map(loss).sum::<f64>() / tokens.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::corpus::Corpus;
    use crate::text::prepare::prepare;
    use crate::text::wordpiece::tiny_vocabulary;
    use std::collections::BTreeSet;

    /// A text of 60 documents; document d says of itself which one it is.
    fn made(dir: &std::path::Path) -> (Arc<Tokens>, Arc<Vocabulary>) {
        let letters = |d: usize| [(b'a' + (d / 26) as u8) as char, (b'a' + (d % 26) as u8) as char];
        let sentence = |d: usize, s: usize| {
            let [a, b] = letters(d);
            format!(
                "The {a} {b} jury said {}ing, elected and working {}!",
                ["play", "work", "elect"][s % 3],
                ["city", "of"][s % 2]
            )
        };
        let documents: Vec<String> =
            (0..60).map(|d| (0..20).map(|s| sentence(d, s)).collect::<Vec<_>>().join("\n") + "\n").collect();
        let path = dir.join("a.txt");
        std::fs::write(&path, documents.join("\n")).unwrap();
        let corpus = Corpus::open(path.to_str().unwrap(), dir, |_| {}).unwrap();
        let vocabulary = Arc::new(Vocabulary::open(&tiny_vocabulary(dir)).unwrap());
        let tokens = prepare(&corpus, &vocabulary, dir).unwrap().unwrap();
        (Arc::new(tokens), vocabulary)
    }

    fn options() -> SamplerOptions {
        SamplerOptions { seq: 48, predictions: 8, whole_words: false, pairs: true, seed: 5, held_out: 0.1 }
    }

    fn sampler(dir: &std::path::Path, split: Split, options: SamplerOptions) -> Sampler {
        let (tokens, vocabulary) = made(dir);
        Sampler::new(tokens, vocabulary, split, options).unwrap()
    }

    #[test]
    fn an_example_is_a_function_of_seed_and_number() {
        let dir = tempfile::tempdir().unwrap();
        let s = sampler(dir.path(), Split::Train, options());
        let whole = s.batch(100..116).unwrap();
        assert_eq!(whole, s.batch(100..116).unwrap());
        let part = s.batch(104..108).unwrap();
        for (i, row) in (4..8).enumerate() {
            assert_eq!(part.tokens.row(i), whole.tokens.row(row));
            assert_eq!(part.targets.row(i), whole.targets.row(row));
        }
        let other = sampler(dir.path(), Split::Train, SamplerOptions { seed: 6, ..options() });
        assert_ne!(other.batch(100..116).unwrap(), whole);
        // What is held out is the same for all.
        let held_out = |seed| sampler(dir.path(), Split::HeldOut, SamplerOptions { seed, ..options() });
        assert_eq!(held_out(5).batch(0..9).unwrap(), held_out(6).batch(0..9).unwrap());
    }

    #[test]
    fn one_word_in_seven_is_masked_four_of_five_by_the_mask_and_special_words_never() {
        let dir = tempfile::tempdir().unwrap();
        let s = sampler(dir.path(), Split::Train, options());
        let batch = s.batch(0..2000).unwrap();
        let (mut masked, mut random, mut kept, mut words) = (0.0, 0.0, 0.0, 0.0);
        for row in 0..2000 {
            let length = batch.lengths[row] as usize;
            words += length as f64;
            assert!(batch.tokens.row(row).iter().skip(length).all(|t| *t == 0), "padding at the end");
            let mut before = -1;
            for p in 0..8 {
                let (at, target) = (batch.positions[[row, p]], batch.targets[[row, p]]);
                if batch.weights[[row, p]] == 0.0 {
                    assert_eq!((at, target), (0, 0));
                    continue;
                }
                assert!(at > before && (at as usize) < length, "in ascending order");
                before = at;
                assert!(![0, 2, 3, 4].contains(&target), "a special word is masked");
                match batch.tokens[[row, at as usize]] {
                    4 => masked += 1.0,
                    now if now == target => kept += 1.0,
                    _ => random += 1.0,
                }
            }
        }
        let all: f64 = masked + random + kept;
        assert!((all / words / 0.15 - 1.0).abs() < 0.05, "{}", all / words);
        assert!((masked / all - 0.8).abs() < 0.02 && (random / all - 0.1).abs() < 0.015, "{masked} {random} {kept}");
    }

    #[test]
    fn half_of_the_pairs_belong_together_and_the_others_come_from_two_documents() {
        let dir = tempfile::tempdir().unwrap();
        let s = sampler(dir.path(), Split::Train, options());
        let batch = s.batch(0..1000).unwrap();
        let others = batch.next.iter().filter(|n| **n == 1).count();
        assert!((400..600).contains(&others), "{others}");
        for row in 0..1000 {
            let length = batch.lengths[row] as usize;
            assert_eq!(batch.tokens[[row, 0]], 2);
            assert_eq!(batch.tokens[[row, length - 1]], 3);
            let second = (0..length).filter(|i| batch.segments[[row, *i]] == 1).count();
            assert!(second > 1 && second < length - 2);
        }
        let alone = sampler(dir.path(), Split::Train, SamplerOptions { pairs: false, ..options() });
        let batch = alone.batch(0..50).unwrap();
        assert!(batch.segments.iter().all(|s| *s == 0) && batch.next.iter().all(|n| *n == 0));
    }

    #[test]
    fn pieces_of_a_word_are_masked_together_if_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let s = sampler(dir.path(), Split::Train, SamplerOptions { whole_words: true, ..options() });
        let batch = s.batch(0..300).unwrap();
        let mut pieces = 0;
        for row in 0..300 {
            let places: BTreeSet<i32> =
                (0..8).filter(|p| batch.weights[[row, *p]] > 0.0).map(|p| batch.positions[[row, p]]).collect();
            for p in 0..8 {
                let (at, target) = (batch.positions[[row, p]], batch.targets[[row, p]]);
                if batch.weights[[row, p]] > 0.0 && s.vocabulary.goes_on[target as usize] && at > 1 {
                    pieces += 1;
                    assert!(places.contains(&(at - 1)), "the piece before it as well");
                }
            }
        }
        assert!(pieces > 50);
    }

    #[test]
    fn what_is_held_out_is_never_trained_on_and_gone_through_once() {
        let dir = tempfile::tempdir().unwrap();
        let plain = SamplerOptions { pairs: false, ..options() };
        let train = sampler(dir.path(), Split::Train, plain.clone());
        let held_out = sampler(dir.path(), Split::HeldOut, plain);
        assert_eq!(train.documents() + held_out.documents(), 60);
        assert!((1..20).contains(&held_out.documents()));
        let places = |s: &Sampler, ids: Range<u64>| -> Vec<(usize, usize)> {
            ids.map(|id| match s.split {
                Split::Train => s.draw_place(&mut Draws::new(s.options.seed, "text", id)),
                Split::HeldOut => s.starts[id as usize],
            })
            .collect()
        };
        let own: BTreeSet<usize> = held_out.documents.iter().copied().collect();
        assert!(places(&train, 0..3000).iter().all(|(d, _)| !own.contains(d)));
        let starts = places(&held_out, 0..held_out.len());
        assert!(starts.iter().all(|(d, _)| own.contains(d)));
        assert_eq!(starts.iter().collect::<BTreeSet<_>>().len(), starts.len());
        let entropy = train.unigram_entropy(&held_out).unwrap();
        assert!((2.0..5.0).contains(&entropy), "{entropy}");
    }

    #[test]
    fn another_vocabulary_and_too_little_text_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (tokens, _) = made(dir.path());
        let other = dir.path().join("other.txt");
        let words = std::fs::read_to_string(dir.path().join("vocab.txt")).unwrap() + "more\n";
        std::fs::write(&other, words).unwrap();
        let other = Arc::new(Vocabulary::open(&other).unwrap());
        let e = Sampler::new(tokens, other, Split::Train, options()).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("made with a vocabulary of 76 words") && e.contains("has 77"), "{e}");
        let path = dir.path().join("one.txt");
        std::fs::write(&path, "The jury said.\n").unwrap();
        let vocabulary = Arc::new(Vocabulary::open(&dir.path().join("vocab.txt")).unwrap());
        let corpus = Corpus::open(path.to_str().unwrap(), dir.path(), |_| {}).unwrap();
        let tokens = Arc::new(prepare(&corpus, &vocabulary, dir.path()).unwrap().unwrap());
        let e = Sampler::new(tokens, vocabulary, Split::Train, options()).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains("text of 1 document is too little"), "{e}");
    }
}
