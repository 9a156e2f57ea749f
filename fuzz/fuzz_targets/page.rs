//! Any bytes as a page of the API; `tests/it/properties.rs` holds the same body against spoiled recordings.
#![no_main]

#[path = "../../tests/support/fakes.rs"]
pub mod fakes;
#[path = "../../tests/support/page.rs"]
mod page;
#[path = "../../tests/support/rules.rs"]
mod rules;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // The length chooses the kind, so that mutations reach every kind.
    let kind = page::KINDS[bytes.len() % page::KINDS.len()];
    if let Err(why) = page::check(bytes, kind) {
        panic!("{why}");
    }
});
