//! Which meshes a number of devices can be.

use crate::error::Error;
use crate::layout::Mesh;

/// Axes that are tried, at the most, as far as so many devices can be split over them.
const AXES: usize = 3;

/// The meshes of so many devices that are tried: every order of factors, none larger than a dimension has chunks. The
/// fewest axes that can be, and one or two more.
///
/// # Errors
/// More devices than a mesh may have.
pub fn meshes(devices: usize, chunks: usize) -> Result<Vec<Mesh>, Error> {
    let fewest = (1..=8).find(|n| !factors(devices, *n, chunks).is_empty());
    let lists = match fewest {
        None => vec![vec![devices]],
        Some(_) if devices == 1 => vec![vec![]],
        Some(fewest) => (fewest..=AXES.max(fewest)).flat_map(|n| factors(devices, n, chunks)).collect(),
    };
    let text = |sizes: &Vec<usize>| {
        let axes = sizes.iter().enumerate().map(|(i, n)| format!("{}={n}", (b'a' + i as u8) as char));
        axes.collect::<Vec<_>>().join(",")
    };
    lists.iter().map(|sizes| text(sizes).parse()).collect()
}

/// The ordered ways to write a number as a product of so many factors from 2 on, none above the largest.
fn factors(n: usize, count: usize, largest: usize) -> Vec<Vec<usize>> {
    match count {
        0 => vec![],
        1 if n <= largest => vec![vec![n]],
        1 => vec![],
        _ => (2..=largest.min(n / 2))
            .filter(|f| n.is_multiple_of(*f))
            .flat_map(|f| factors(n / f, count - 1, largest).into_iter().map(move |rest| [vec![f], rest].concat()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_devices_is_every_mesh_that_could_be_split() {
        let texts = |n, chunks| meshes(n, chunks).unwrap().iter().map(Mesh::to_string).collect::<Vec<_>>();
        assert_eq!(texts(1, 8), ["1"]);
        assert_eq!(texts(8, 8), ["a=8", "a=2,b=4", "a=4,b=2", "a=2,b=2,c=2"]);
        assert_eq!(texts(4096, 8), ["a=8,b=8,c=8,d=8"]);
        assert_eq!(
            texts(64, 8),
            [
                "a=8,b=8",
                "a=2,b=4,c=8",
                "a=2,b=8,c=4",
                "a=4,b=2,c=8",
                "a=4,b=4,c=4",
                "a=4,b=8,c=2",
                "a=8,b=2,c=4",
                "a=8,b=4,c=2"
            ]
        );
        // Nothing can be split over eleven devices.
        assert_eq!(texts(11, 8), ["a=11"]);
    }
}
