//! Vectors of texts: the mean of a pretrained encoder's output over a text's tokens.
//!
//! Texts are put together with others of about their length, so that little of a batch is padding. Which length a text is
//! padded to depends on it alone, so its vector does not depend on the others, to the bit.

use super::hf::{self, Fit, HfError};
use super::model::{Model, Text};
use crate::text::wordpiece::Vocabulary;
use coordinator::Session;
use mesh::array::Array;
use mesh::dim::{DType, dim};
use mesh::error::Error;
use mesh::nn::Mode;
use mesh::program::{Program, ProgramBuilder};
use ndarray::{Array1, Array2};
use std::io::Write;
use std::path::Path;
use worker::data::DataError;

/// The shortest length that texts are padded to; the others are twice, four times, .. as much.
const SHORTEST: usize = 16;

/// How texts are embedded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbedOptions {
    /// Texts at a time.
    pub batch: usize,
    /// A text is cut off after so many tokens, with `[CLS]` and `[SEP]`; no more than the model has positions.
    pub tokens: usize,
    /// Whether vectors are brought to length 1.
    pub normalize: bool,
    /// What the model computes in.
    pub dtype: DType,
}

impl Default for EmbedOptions {
    /// 32 texts of 256 tokens, vectors as they are, in f32.
    fn default() -> Self {
        EmbedOptions { batch: 32, tokens: 256, normalize: false, dtype: DType::F32 }
    }
}

/// A model that embeds texts.
pub struct Embedder {
    model: hf::Model,
    vocabulary: Vocabulary,
    options: EmbedOptions,
    lengths: Vec<usize>,
}

impl Embedder {
    /// Opens a folder with a model and its vocabulary.
    ///
    /// # Errors
    /// Files that are missing or wrong; a vocabulary that is larger than the model's.
    pub fn open(folder: &Path, options: EmbedOptions) -> Result<Embedder, HfError> {
        let (model, vocabulary) = (hf::Model::open(folder)?, Vocabulary::open(folder)?);
        let architecture = &model.config.architecture;
        if vocabulary.size > architecture.vocab_size {
            let why = format!("it has {} words, and the model knows {}", vocabulary.size, architecture.vocab_size);
            return Err(DataError::Format { path: vocabulary.path, why }.into());
        }
        let most = options.tokens.clamp(2, architecture.max_position_embeddings.max(2));
        let doubled = std::iter::successors(Some(SHORTEST), |n| Some(2 * n)).take_while(|n| *n < most);
        let lengths = doubled.chain([most]).collect();
        Ok(Embedder { model, vocabulary, options, lengths })
    }

    fn function(length: usize) -> String {
        format!("embed.{length}")
    }

    /// The program: a function for each length that texts are padded to.
    ///
    /// # Errors
    /// What is wrong with the sizes, with its place.
    pub fn program(&self) -> Result<Program, Error> {
        let mut p = ProgramBuilder::new();
        let architecture = &self.model.config.architecture;
        for length in &self.lengths {
            p.function(Self::function(*length), |g| {
                let text = Text::feeds(g, &dim("batch", self.options.batch), *length);
                let model = Model { architecture, mode: Mode::Eval, dtype: self.options.dtype };
                let x = model.encoder(&text, None);
                g.output("vectors", &model.mean_pooled(&x, &text));
            })?;
        }
        p.finish()
    }

    /// Finds the weights for the program before any session begins; what the user should know is in the notes.
    ///
    /// # Errors
    /// Tensors that are missing, unknown, or of another shape, by name.
    pub fn check(&self, program: &Program) -> Result<Fit, HfError> {
        self.model.check(program, false)
    }

    /// Loads the weights into a session of the program.
    ///
    /// # Errors
    /// A file that cannot be read; a session that is lost.
    pub fn load(&self, session: &mut Session, fit: &Fit) -> Result<(), HfError> {
        self.model.load(session, fit, |_, _| ())
    }

    /// The vectors of texts, in their order; `progress` is told how many are done.
    ///
    /// # Errors
    /// A text that cannot be cut into tokens; a session that is lost.
    pub fn embed(
        &self,
        session: &mut Session,
        texts: &[impl AsRef<str>],
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Vec<f32>>, HfError> {
        let tokens = texts.iter().map(|t| self.tokens(t.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let mut vectors = vec![vec![]; texts.len()];
        let (mut begin, mut done) = (0, 0);
        for length in &self.lengths {
            let own: Vec<usize> = (0..texts.len()).filter(|i| (begin..=*length).contains(&tokens[*i].len())).collect();
            begin = length + 1;
            for group in own.chunks(self.options.batch) {
                let rows: Vec<&[i32]> = group.iter().map(|i| &*tokens[*i]).collect();
                for (i, vector) in group.iter().zip(self.batch(session, *length, &rows)?) {
                    vectors[*i] = vector;
                }
                done += group.len();
                progress(done);
            }
        }
        Ok(vectors)
    }

    /// `[CLS]` text `[SEP]`, cut to the longest length.
    fn tokens(&self, text: &str) -> Result<Vec<i32>, HfError> {
        let words = self.vocabulary.encode(text)?;
        let most = self.lengths.last().map_or(2, |n| *n);
        let inner = words.into_iter().take(most - 2);
        let all = std::iter::once(self.vocabulary.begin()).chain(inner).chain([self.vocabulary.end()]);
        Ok(all.map(|t| t as i32).collect())
    }

    fn batch(&self, session: &mut Session, length: usize, rows: &[&[i32]]) -> Result<Vec<Vec<f32>>, HfError> {
        let (batch, pad) = (self.options.batch, self.vocabulary.specials.pad as i32);
        let tokens = Array2::from_shape_fn((batch, length), |(b, s)| {
            rows.get(b).and_then(|row| row.get(s)).copied().unwrap_or(pad)
        });
        // Rows that are not needed have a word as well: there is no mean of none.
        let lengths = Array1::from_shape_fn(batch, |b| rows.get(b).map_or(1, |row| row.len() as i32));
        let feeds: [(&str, Array); 3] = [
            ("tokens", tokens.into()),
            ("segments", Array2::<i32>::zeros((batch, length)).into()),
            ("lengths", lengths.into()),
        ];
        let f = session.function(&Self::function(length))?;
        for (name, array) in &feeds {
            session.feed(f, name, array)?;
        }
        session.step(f, 0)?;
        let vectors = session.fetch(f, "vectors")?;
        let rows_out = vectors.as_f32().into_iter().flat_map(|a| a.outer_iter()).take(rows.len());
        Ok(rows_out.map(|v| self.finished(v.iter().copied().collect())).collect())
    }

    fn finished(&self, mut vector: Vec<f32>) -> Vec<f32> {
        if self.options.normalize {
            let norm = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
            vector.iter_mut().for_each(|v| *v /= norm.max(f32::MIN_POSITIVE));
        }
        vector
    }
}

/// Writes a line of JSON for each text: `{"text": .., "vector": [..]}`.
///
/// # Errors
/// What cannot be written.
pub fn write_json_lines(out: &mut impl Write, texts: &[impl AsRef<str>], vectors: &[Vec<f32>]) -> std::io::Result<()> {
    #[derive(serde::Serialize)]
    struct Line<'a> {
        text: &'a str,
        vector: &'a [f32],
    }
    for (text, vector) in texts.iter().zip(vectors) {
        serde_json::to_writer(&mut *out, &Line { text: text.as_ref(), vector })?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
