//! A token file from anywhere, with the seal that it ought to have: refused, or every sentence of every document is there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use worker::data::tokens::{Origin, Tokens, Writer};

const HEAD: usize = 128;
const SEAL: usize = 32;

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("fuzz-tokens-{}-{name}", std::process::id()))
}

fn file(vocabulary: u32) -> Vec<u8> {
    let (path, origin) = (scratch("seed"), Origin { vocabulary, words: [7; 32], source: [9; 32] });
    let _ = std::fs::remove_file(&path);
    let mut writer = Writer::open(&path, &origin).expect("a file");
    writer.add(&[vec![1, 2, 3], vec![4]]).expect("a document");
    writer.add(&[vec![5; 9]]).expect("a document");
    writer.finish().expect("a whole file");
    let bytes = std::fs::read(&path).expect("the file");
    let _ = std::fs::remove_file(&path);
    bytes
}

/// The file with the seal of what it holds: what is looked at behind that counts here.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut all = bytes.to_vec();
    if all.len() < HEAD + SEAL {
        return all;
    }
    let word = |at: usize| u64::from_le_bytes(all[at..at + 8].try_into().expect("eight bytes"));
    let width = if u32::from_le_bytes(all[12..16].try_into().expect("four bytes")) <= 1 << 16 { 2 } else { 4 };
    let index = word(16).saturating_mul(width).saturating_add(7) / 8 * 8;
    let (index, seal) = (index.saturating_add(HEAD as u64), all.len() - SEAL);
    if index <= seal as u64 {
        let hash = blake3::Hasher::new().update(&all[..HEAD]).update(&all[index as usize..seal]).finalize();
        all[seal..].copy_from_slice(hash.as_bytes());
    }
    all
}

fuzz_target!(
    init: fuzz::seed("tokens", [file(100), file(100_000)]),
    |bytes: &[u8]| {
        let path = scratch("file");
        std::fs::write(&path, sealed(bytes)).expect("a scratch file");
        if let Ok(tokens) = Tokens::open(&path) {
            let [words, sentences, documents] = tokens.counts();
            assert!(words <= bytes.len() && sentences <= words && documents <= sentences);
            assert_eq!(tokens.document(documents - 1).end, sentences);
            assert_eq!(tokens.sentence(sentences - 1).end, words);
            for document in 0..documents {
                for sentence in tokens.document(document) {
                    let (places, mut read) = (tokens.sentence(sentence), vec![]);
                    assert_eq!(tokens.place(places.start), (document, sentence));
                    if tokens.read(places.clone(), &mut read).is_ok() {
                        assert_eq!(read.len(), places.len());
                    }
                }
            }
        }
    }
);
