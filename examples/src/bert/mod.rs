//! BERT and two ways to train it with less: the model, its programs, and its sizes.
//!
//! | module | what it is |
//! |---|---|
//! | [`architecture`] | sizes, as in Hugging Face's config.json |
//! | [`model`] | the encoder and its heads |
//! | [`dropping`] | token dropping |
//! | [`sharing`] | sharing weights, then unsharing |
//! | [`program`] | the programs: pretraining, fine-tuning, embedding |
//! | [`hf`] | Hugging Face's folders in and out |
//! | [`embed`] | vectors of texts |

pub mod architecture;
pub mod dropping;
pub mod embed;
pub mod hf;
pub mod model;
pub mod program;
pub mod sharing;
