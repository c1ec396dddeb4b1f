//! A hash that is quick for small numbers and short names: what a search looks up many millions of times. It is no defence
//! against keys that are chosen to collide, so it is not for what a coordinator plans for others.

use std::hash::{BuildHasherDefault, Hasher};

/// Hashes for maps.
pub type Quick = BuildHasherDefault<Mixed>;

/// Mixes in a word at a time.
#[derive(Default)]
pub struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            self.write_u64(word.iter().fold(0, |all, b| all << 8 | u64::from(*b)));
        }
    }
    fn write_u8(&mut self, n: u8) {
        self.write_u64(u64::from(n));
    }
    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }
    fn write_u128(&mut self, n: u128) {
        self.write_u64(n as u64);
        self.write_u64((n >> 64) as u64);
    }
    fn write_u64(&mut self, n: u64) {
        // Both ends of the product: tables look at the low bits and at the highest ones.
        let wide = u128::from(self.0 ^ n ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (wide ^ wide >> 64) as u64;
    }
}
