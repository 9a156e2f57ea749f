//! Which devices the user asks for: fleets, and tags that a device must have.

use crate::values::BadValue;
use std::fmt;

use super::device::{self, Device};

/// Fleets and tags that narrow the devices down.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Devices of any of these fleets; none means every fleet that the key sees.
    pub fleets: Vec<FleetRef>,
    /// Devices with all of these tags.
    pub tags: Vec<TagFilter>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FleetRef {
    /// `organization/name`, unique. The API stores slugs in lower case and compares them case-sensitively.
    Slug(String),
    /// Database id, unique; it survives a rename.
    Id(u64),
    /// Names are not unique across organizations.
    Name(String),
}

impl FleetRef {
    /// All digits are an id, text with `/` a slug, other text a name.
    pub fn parse(text: &str) -> Result<Self, BadValue> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().map(FleetRef::Id).map_err(|_| format!("{text} is too large for an id").into());
        }
        match *text.split('/').collect::<Vec<_>>() {
            [name] => Ok(FleetRef::Name(name.to_owned())),
            [organization, name] if !organization.is_empty() && !name.is_empty() => {
                Ok(FleetRef::Slug(text.to_lowercase()))
            }
            _ => Err(format!("{text:?} is not organization/name").into()),
        }
    }

    /// Whether it names the fleet with this id, name and slug.
    pub fn names(&self, id: Option<u64>, name: &str, slug: &str) -> bool {
        match self {
            FleetRef::Id(wanted) => id == Some(*wanted),
            FleetRef::Name(wanted) => name == wanted,
            FleetRef::Slug(wanted) => slug == wanted,
        }
    }
}

impl fmt::Display for FleetRef {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            FleetRef::Slug(text) | FleetRef::Name(text) => f.write_str(text),
            FleetRef::Id(id) => write!(f, "{id}"),
        }
    }
}

/// A tag that a device must have, `key` or `key=value`. In the key, `\=` is an equals sign and `\\` a backslash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagFilter {
    pub key: String,
    /// The tag's value; none matches every value.
    pub value: Option<String>,
}

impl TagFilter {
    /// Splits at the first `=` without a backslash before it.
    pub fn parse(text: &str) -> Result<Self, BadValue> {
        let mut key = String::new();
        let mut rest = text.chars();
        let value = loop {
            match rest.next() {
                None => break None,
                Some('=') => break Some(rest.as_str().to_owned()),
                Some('\\') if rest.as_str().starts_with(['=', '\\']) => key.extend(rest.next()),
                Some(c) => key.push(c),
            }
        };
        if !(1..=100).contains(&key.chars().count()) || key.contains(char::is_whitespace) {
            return Err(format!("{key:?} is not a tag's key, which has 1 to 100 characters and no white space").into());
        }
        Ok(TagFilter { key, value })
    }

    /// Whether the device has the tag. A tag of the device beats the same tag of its fleet.
    pub fn matches(&self, device: &Device) -> bool {
        let tag = |tags| device::tag_value(tags, &self.key);
        let found = tag(device.tags()).or_else(|| tag(device.fleet_tags()));
        found.is_some_and(|found| self.value.as_ref().is_none_or(|wanted| wanted == found))
    }
}
