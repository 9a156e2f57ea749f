//! What is asked of the API, as `OData` text.
//!
//! The API's `OData` parser takes `, ( ) / : = ; _` only unencoded. Nothing here is form-encoded: spaces and the text
//! within quotes are percent-encoded, nothing else.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::selection::{FleetRef, Selection, TagFilter};

/// What is asked of the API.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Up to `limit` records of a list by ascending id, from above `after`.
    Page { list: Listing, after: u64, limit: usize },
    /// The id of the first record of a list above this one.
    NextId(Listing, u64),
    /// The releases with these ids, in the form of [`Listing::Releases`].
    ReleasesById(&'a [u64]),
    /// The fleets of the first devices that the key sees, selected or not.
    EveryFleet,
    /// Whose key it is, as an [`Actor`](super::Actor) with the name `actorType`.
    Owner,
}

#[derive(Clone, Copy, Debug)]
pub enum Listing {
    /// What discovery needs of the selected devices.
    Devices,
    /// Something else of them: a `$select`, with or without an `$expand`.
    DevicesWith(&'static str),
    /// Their state, and what is asked for beside what every server knows.
    State(StateFields),
    /// Their services that do not run, each with its own id.
    NotRunning,
    /// Releases that devices of the selected fleets run, with the labels of their services.
    Releases,
}

impl Listing {
    pub fn what(self) -> &'static str {
        match self {
            Listing::Devices | Listing::DevicesWith(_) | Listing::State(_) => "devices",
            Listing::NotRunning => "services",
            Listing::Releases => "releases",
        }
    }
}

pub type StateFields = [bool; STATE_FIELDS.len()];

/// Fields of the state of a device that older servers do not know, or that a key may not read: a part of the `$select` and a part
/// of the `$expand` each.
const STATE_FIELDS: [[&str; 2]; 4] = [
    ["update_status,last_update_status_event", ""],
    ["created_at", ""],
    ["os_version", "should_be_operated_by__release($select=raw_version)"],
    ["supervisor_version", "should_be_managed_by__release($select=raw_version)"],
];

/// These fields, as a message names them.
pub fn names(fields: StateFields) -> String {
    let expands = parts(fields, 1).filter_map(|text| text.split('(').next());
    parts(fields, 0).chain(expands).collect::<Vec<_>>().join(", ")
}

fn parts(fields: StateFields, part: usize) -> impl Iterator<Item = &'static str> {
    let chosen = STATE_FIELDS.into_iter().zip(fields).filter(|(_, is_chosen)| *is_chosen);
    chosen.map(move |(parts, _)| parts[part]).filter(|text| !text.is_empty())
}

/// The text of each [`Request`] for the devices that the user selects.
#[derive(Clone, Debug)]
pub struct Query {
    /// The fields of a device that discovery needs.
    fields: String,
    // The filters of the lists.
    devices: String,
    installs: String,
    releases: String,
}

/// The labels that discovery understands, and those that are almost spelled like them. `composition` of a release has them too,
/// without the overrides; it is many times as large, and holds the services' environment, in which there may be secrets.
const LABELS: &str = "$select=label_name,value;$filter=startswith(label_name,'prometheus')%20or%20\
    startswith(label_name,'Prometheus')%20or%20startswith(label_name,'io.prometheus');$orderby=label_name%20asc";

/// What is asked of each service that does not run. `download_progress` changes every 30 s while anything downloads.
const NOT_RUNNING: &str = "$select=id,device,status,download_progress&$expand=installs__image($select=id;\
    $expand=is_a_build_of__service($select=service_name)),is_provided_by__release($select=id)";

const NOT_RUNNING_FILTER: &str = "%20and%20status%20ne%20'Running'%20and%20status%20ne%20'deleted'";

/// What is asked of each device's state. `is_connected_to_vpn` is the connection itself; a device can set its own `is_online`.
const STATE: [&str; 2] = [
    "$select=id,is_connected_to_vpn,last_vpn_event,api_heartbeat_state",
    "&$expand=is_running__release($select=id),should_be_running__release($select=id,raw_version)",
];

/// The fleets of many devices in one answer.
const EVERY_FLEET: &str = "$select=id&$expand=belongs_to__application($select=id,slug)&$orderby=id%20asc&$top=10000";

/// References of a device that are expanded in every request for devices. Without an order, the tags of a page may come in
/// another order while nothing has changed, and the page then has a new `ETag`.
const EXPAND: &str = "is_of__device_type($select=slug),belongs_to__application($select=id,app_name,slug;\
    $expand=organization($select=handle),application_tag($select=tag_key,value;$orderby=tag_key%20asc)),\
    is_running__release($select=id,commit,raw_version),\
    device_tag($select=tag_key,value;$orderby=tag_key%20asc)";

impl Query {
    /// Asks for these fields of the selected devices. A field that changes by itself belongs here only if it is used: without it,
    /// the pages of a quiet fleet stay the same.
    pub fn new<'a>(fields: impl IntoIterator<Item = &'a str>, selection: &Selection) -> Self {
        let fields = ["id", "uuid"].into_iter().chain(fields).collect::<Vec<_>>().join(",");
        let and = |filter: String| format!("%20and%20{filter}");
        let of_devices = filter(selection, "d/").map(|filter| and(format!("device/any(d:{filter})")));
        let of_fleets = fleet_filter(&selection.fleets, "d/").unwrap_or_else(|| "d/id%20gt%200".into());
        Query {
            fields,
            devices: filter(selection, "").map(and).unwrap_or_default(),
            installs: NOT_RUNNING_FILTER.to_owned() + &of_devices.unwrap_or_default(),
            releases: and(format!("is_running_on__device/any(d:{of_fleets})")),
        }
    }

    pub fn path(&self, request: Request) -> String {
        match request {
            Request::Page { list, after, limit } => self.page(list, &self.what(list), after, limit),
            Request::NextId(list, after) => self.page(list, "$select=id", after, 1),
            Request::EveryFleet => format!("/v7/device?{EVERY_FLEET}"),
            Request::Owner => "/actor/v1/whoami".into(),
            Request::ReleasesById(ids) => {
                let ids: Vec<_> = ids.iter().map(u64::to_string).collect();
                let what = self.what(Listing::Releases);
                format!("/v7/release?{what}&$filter=id%20in%20({})&$orderby=id%20asc", ids.join(","))
            }
        }
    }

    /// What is asked of each record.
    fn what(&self, list: Listing) -> String {
        match list {
            Listing::Devices => format!("$select={}&$expand={EXPAND}", self.fields),
            Listing::DevicesWith(what) => what.to_owned(),
            Listing::State(more) => {
                let part = |part| parts(more, part).fold(STATE[part].to_owned(), |text, more| text + "," + more);
                part(0) + &part(1)
            }
            Listing::NotRunning => NOT_RUNNING.to_owned(),
            Listing::Releases => format!(
                "$select=id,raw_version&$expand=belongs_to__application($select=slug),\
                 release_image($select=id;$orderby=id%20asc;$expand=image($select=id;$expand=is_a_build_of__service(\
                 $select=service_name;$expand=service_label({LABELS}))),image_label({LABELS}))"
            ),
        }
    }

    /// `$orderby=id` alone would mean descending.
    fn page(&self, list: Listing, what: &str, after: u64, limit: usize) -> String {
        let (resource, filter) = match list {
            Listing::Devices | Listing::DevicesWith(_) | Listing::State(_) => ("device", &self.devices),
            Listing::NotRunning => ("image_install", &self.installs),
            Listing::Releases => ("release", &self.releases),
        };
        format!("/v7/{resource}?{what}&$filter=(id%20gt%20{after}){filter}&$orderby=id%20asc&$top={limit}")
    }
}

/// Any of the fleets and all of the tags. `and` and `or` have equal precedence in the API, hence the parentheses. `of` is what
/// the fields of a device begin with.
fn filter(selection: &Selection, of: &str) -> Option<String> {
    let tags = selection.tags.iter().filter_map(|tag| tag_clause(tag, of));
    fleet_filter(&selection.fleets, of).into_iter().chain(tags).reduce(|filter, clause| filter + "%20and%20" + &clause)
}

fn fleet_filter(fleets: &[FleetRef], of: &str) -> Option<String> {
    any_of(fleets.iter().map(|fleet| format!("{of}{}", fleet_clause(fleet))))
}

fn fleet_clause(fleet: &FleetRef) -> String {
    match fleet {
        FleetRef::Slug(slug) => format!("belongs_to__application/any(a:a/slug%20eq%20{})", literal(slug)),
        FleetRef::Id(id) => format!("belongs_to__application%20eq%20{id}"),
        FleetRef::Name(name) => format!("belongs_to__application/any(a:a/app_name%20eq%20{})", literal(name)),
    }
}

/// The device or its fleet has the tag. A device whose own tag differs from its fleet's comes too: the mapping leaves it out
/// with a reason.
fn tag_clause(tag: &TagFilter, of: &str) -> Option<String> {
    let value = tag.value.as_ref().map(|value| format!("%20and%20t/value%20eq%20{}", literal(value)));
    let holds = format!("any(t:t/tag_key%20eq%20{}{})", literal(&tag.key), value.unwrap_or_default());
    any_of([format!("{of}device_tag/{holds}"), format!("{of}belongs_to__application/any(a:a/application_tag/{holds})")])
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
