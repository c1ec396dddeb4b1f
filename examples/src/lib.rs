//! What every model program shares: a program brings its network, its data, and what it shows of a step.
//!
//! [`settings`] is the configuration, in layers, with the keys that every run has; [`cli`] the options that set them, and
//! those of devices and run folder; [`machine`] reads what a machine can do; [`memory`] makes its program fit; [`search`] looks for its layout; [`plan`] shows what a run would do; [`run`] trains, or judges a checkpoint, on devices wherever they are, and says how it
//! failed; [`report`] is what people see of it: rows of figures and progress; [`tensorboard`] has the figures for the tool
//! of that name, and [`chart`] draws them. [`bert`] is a model that more than one program uses, [`text`] what language models read.

pub mod bert;
pub mod chart;
pub mod cli;
pub mod machine;
pub mod memory;
pub mod plan;
pub mod report;
pub mod run;
pub mod search;
pub mod settings;
pub mod tensorboard;
pub mod text;
