//! What the model programs are made of.

pub mod bert;
