//! The one request that tells all of a page of devices, as text.
//!
//! The API's `OData` parser takes `, ( ) / : = ; _` only unencoded, so nothing here is form-encoded: only what stands
//! in quotes is percent-encoded, and spaces.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::discovery::steering::TagFilter;
use crate::discovery::target::{Address, Rules};

/// A fleet as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FleetRef {
    /// `organization/name`, unique.
    Slug(String),
    /// Database id, unique.
    Id(u64),
    /// Names are not unique across organizations.
    Name(String),
}

impl FleetRef {
    /// With `/` a slug, all digits an id, else a name.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().map(FleetRef::Id).map_err(|_| format!("{text} is too large for an id"));
        }
        match *text.split('/').collect::<Vec<_>>() {
            [name] => Ok(FleetRef::Name(name.to_owned())),
            [organization, name] if !organization.is_empty() && !name.is_empty() => Ok(FleetRef::Slug(text.to_owned())),
            _ => Err(format!("{text:?} is not organization/name")),
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

/// What is asked of each page; only its beginning and its size differ from page to page.
#[derive(Clone, Debug)]
pub struct Query {
    fields: String,
    filter: String,
}

const EXPAND: &str = "is_of__device_type($select=slug),belongs_to__application($select=id,app_name,slug;\
    $expand=organization($select=handle),application_tag($select=tag_key,value)),\
    is_running__release($select=commit,raw_version),device_tag($select=tag_key,value)";

impl Query {
    /// Selects what changes by itself only where it is used, so that the pages of a quiet fleet stay the same.
    pub fn new(fleets: &[FleetRef], rules: &Rules) -> Self {
        let mut fields = "id,uuid,device_name,os_version,os_variant,supervisor_version".to_owned();
        if rules.online_only {
            fields.push_str(",is_online");
        }
        fields.push_str(match rules.address {
            Address::Vpn => "",
            Address::Public => ",is_web_accessible",
            Address::Lan => ",ip_address",
        });
        Query { fields, filter: filter(fleets, &rules.tags) }
    }

    /// Path and query of a page for discovery.
    pub fn page(&self, after: u64, top: usize) -> String {
        self.ask(&format!("$select={}&$expand={EXPAND}", self.fields), after, top)
    }

    /// Path and query of this much of up to `top` devices with ids above `after`, by rising id: `$orderby=id` alone
    /// would mean descending.
    pub fn ask(&self, what: &str, after: u64, top: usize) -> String {
        format!("/v7/device?{what}&$filter=(id%20gt%20{after}){}&$orderby=id%20asc&$top={top}", self.filter)
    }
}

/// Any of the fleets and all of the tags. `and` and `or` have equal precedence in the API, hence the parentheses.
fn filter(fleets: &[FleetRef], tags: &[TagFilter]) -> String {
    let fleets = any_of(fleets.iter().map(|fleet| match fleet {
        FleetRef::Slug(slug) => format!("belongs_to__application/any(a:a/slug%20eq%20{})", literal(slug)),
        FleetRef::Id(id) => format!("belongs_to__application%20eq%20{id}"),
        FleetRef::Name(name) => format!("belongs_to__application/any(a:a/app_name%20eq%20{})", literal(name)),
    }));
    // A device whose own tag differs from its fleet's comes too; the mapping leaves it out and says why.
    let tags = tags.iter().map(|tag| {
        let key = literal(&tag.key);
        let value = tag.value.as_ref().map(|value| format!("%20and%20t/value%20eq%20{}", literal(value)));
        let holds = format!("any(t:t/tag_key%20eq%20{key}{})", value.unwrap_or_default());
        any_of([format!("device_tag/{holds}"), format!("belongs_to__application/any(a:a/application_tag/{holds})")])
    });
    let clauses = std::iter::once(fleets).chain(tags).flatten();
    clauses.fold(String::new(), |filter, clause| filter + "%20and%20" + &clause)
}

fn any_of(clauses: impl IntoIterator<Item = String>) -> Option<String> {
    let both = |left, right| format!("({left}%20or%20{right})");
    clauses.into_iter().map(|clause| format!("({clause})")).reduce(both)
}

fn literal(text: &str) -> String {
    const PLAIN: &AsciiSet =
        &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/').remove(b'\'');
    format!("'{}'", utf8_percent_encode(&text.replace('\'', "''"), PLAIN))
}
