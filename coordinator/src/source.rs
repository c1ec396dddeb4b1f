//! Where feeds come from: a source is asked for the boxes that devices hold, one after the other, and for nothing else.

use crate::error::{Failure, feed};
use mesh::array::Array;
use mesh::dim::{DType, Type};
use mesh::region::Region;

/// Where a feed comes from. It need never be in memory as a whole: a source is asked once for each box that devices hold,
/// and only when the box before is on its way. An [`Array`] is one that slices itself.
pub trait Source {
    /// Element type.
    fn dtype(&self) -> DType;

    /// Extents of the whole, in the order of the feed's dimensions.
    fn shape(&self) -> Vec<usize>;

    /// The box `at` of it, which lies inside and is not empty: global indices by dimension, in the feed's order.
    ///
    /// # Errors
    /// Why it cannot be had; the session fails with that ([`Failure::Source`]).
    fn part(&self, at: &Region) -> Result<Array, Box<dyn std::error::Error + Send + Sync>>;
}

impl Source for Array {
    fn dtype(&self) -> DType {
        Array::dtype(self)
    }
    fn shape(&self) -> Vec<usize> {
        Array::shape(self).to_vec()
    }
    fn part(&self, at: &Region) -> Result<Array, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Array::part(self, at))
    }
}

/// A box of a tensor, and the devices that hold it.
pub(crate) struct Piece {
    pub at: Region,
    pub devices: Vec<usize>,
    pub array: Array,
}

/// The boxes of a tensor that devices hold (`held`, by device), each once, made when they are asked for. `what` is the
/// tensor's name in messages.
///
/// # Errors
/// A source of another type; a box that it cannot give, or gives as something else.
pub(crate) fn pieces<'a>(
    what: &'a str,
    ty: &'a Type,
    held: impl Iterator<Item = &'a Region>,
    source: &'a dyn Source,
) -> Result<impl Iterator<Item = Result<Piece, Failure>> + 'a, Failure> {
    if source.dtype() != ty.dtype || source.shape() != ty.shape() {
        let what = format!("{what} is {ty}, and was given {} of shape {:?}", source.dtype(), source.shape());
        return Err(feed(what, "give an array of that type, its dimensions in that order"));
    }
    let mut boxes: Vec<(&Region, Vec<usize>)> = Vec::new();
    for (device, region) in held.enumerate().filter(|(_, r)| !r.is_empty()) {
        match boxes.iter_mut().find(|(at, _)| *at == region) {
            Some((_, devices)) => devices.push(device),
            None => boxes.push((region, vec![device])),
        }
    }
    Ok(boxes.into_iter().map(move |(at, devices)| {
        let array =
            source.part(at).map_err(|e| Failure::Source { what: format!("{what} at {at}"), why: e.to_string() })?;
        if array.dtype() != ty.dtype || array.shape() != at.shape() {
            let (dtype, shape) = (array.dtype(), array.shape());
            let what = format!("{what} at {at} is {}, and its source gave {dtype} of shape {shape:?}", at.local(ty));
            return Err(feed(what, "a source gives just the box that it is asked for"));
        }
        Ok(Piece { at: at.clone(), devices, array })
    }))
}
