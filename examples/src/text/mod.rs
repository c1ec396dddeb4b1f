//! Text for language models: from documents to batches.
//!
//! | module | what it is |
//! |---|---|
//! | [`corpus`] | where text comes from: files, folders, JSON lines, the Brown corpus |
//! | [`wordpiece`] | text as numbers of a vocabulary |
//! | [`kept`] | the vocabulary of a run, in its folder |
//! | [`prepare`] | a corpus as a token file, made once |
//! | [`sampler`] | masked examples of a token file, as a function of seed and number |
//! | [`labelled`] | sentences with labels, to fine-tune on |
//! | [`packages`] | what is fetched from packages |

pub mod corpus;
pub mod kept;
pub mod labelled;
pub mod packages;
pub mod prepare;
pub mod sampler;
pub mod wordpiece;
