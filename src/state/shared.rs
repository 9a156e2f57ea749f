//! Values that many records of a page have in common, each kept once.

use std::collections::HashSet;
use std::hash::Hash;
use std::num::NonZeroU64;
use std::sync::Arc;

/// Characters of a word that are kept.
const MAX_LENGTH: usize = 200;

/// An image on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    /// Its id; none where the key may not read it.
    pub id: Option<NonZeroU64>,
    /// Id of the release that it belongs to. An image that two releases share belongs to the newer one as soon as that is
    /// downloaded.
    pub release: Option<NonZeroU64>,
}

/// What the records of a page share.
#[derive(Default)]
pub struct Shared {
    words: HashSet<Arc<str>>,
    images: HashSet<Arc<[Image]>>,
}

impl Shared {
    /// This word.
    pub fn word(&mut self, word: &str) -> Arc<str> {
        share(&mut self.words, word.char_indices().nth(MAX_LENGTH).map_or(word, |(end, _)| &word[..end]))
    }

    /// These images.
    pub fn images(&mut self, images: &[Image]) -> Arc<[Image]> {
        share(&mut self.images, images)
    }
}

fn share<T: Eq + Hash + ?Sized>(known: &mut HashSet<Arc<T>>, value: &T) -> Arc<T>
where
    Arc<T>: for<'a> From<&'a T>,
{
    if let Some(known) = known.get(value) {
        return known.clone();
    }
    let new = Arc::from(value);
    known.insert(Arc::clone(&new));
    new
}
