//! A release as the API describes it: its services and their labels, as a fleet's `docker-compose.yml` has them.
//!
//! balena's build stores `labels:` of a service as `image_label`. The owner of a fleet can override a label for a service
//! (`service_label`), and a device's supervisor applies the override. Labels can change after the release was made.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::device::{self, Fleet, Text, one, up_to};

/// The most services of a release that are read.
const MAX_SERVICES: usize = 200;
/// The most labels of a service that are read, of each of its two kinds.
const MAX_LABELS: usize = 50;
/// The most bytes of the name or the value of a label: the API allows 300 characters.
const MAX_LABEL_SIZE: usize = 1200;

/// A release with the labels of its services.
#[derive(Debug, PartialEq, Eq)]
pub struct ReleaseServices {
    /// Database id.
    pub id: u64,
    /// Its version, `1.2.3`; empty if it has none.
    pub version: String,
    /// Slug of its fleet; empty if the API does not name it.
    pub fleet: String,
    /// Its services, in the API's order.
    pub services: Vec<Service>,
    /// What is not read of it, and why.
    pub problems: Vec<String>,
}

/// A service of a release.
#[derive(Debug, PartialEq, Eq)]
pub struct Service {
    /// Id of its image.
    pub image: Option<NonZeroU64>,
    /// Its name in `docker-compose.yml`.
    pub name: String,
    /// Its labels that begin with the prefix that was asked for. An override replaces the label of the same name.
    pub labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct ReleaseRecord<'a> {
    id: u64,
    raw_version: Option<Text<'a>>,
    #[serde(rename = "belongs_to__application", default, deserialize_with = "one")]
    fleet: Option<Fleet<'a>>,
    #[serde(rename = "release_image")]
    images: Option<Vec<ReleaseImage<'a>>>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct ReleaseImage<'a> {
    #[serde(default, deserialize_with = "one")]
    image: Option<ImageOfService<'a>>,
    #[serde(rename = "image_label")]
    labels: Option<Vec<LabelRecord<'a>>>,
}

/// An image, as the API describes it, with its service.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct ImageOfService<'a> {
    /// Its id.
    pub id: Option<NonZeroU64>,
    /// None where the key may not read it.
    #[serde(rename = "is_a_build_of__service", default, deserialize_with = "one")]
    pub service: Option<ServiceRecord<'a>>,
}

/// A service, as the API describes it.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct ServiceRecord<'a> {
    /// Its name in `docker-compose.yml`.
    pub service_name: Option<Text<'a>>,
    #[serde(rename = "service_label")]
    overrides: Option<Vec<LabelRecord<'a>>>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct LabelRecord<'a> {
    label_name: Option<Text<'a>>,
    value: Option<Text<'a>>,
}

/// Reads a release.
///
/// # Errors
/// The record cannot be used. An incomplete release must not be used either: it would drop targets.
pub fn parse(raw: &RawValue) -> Result<ReleaseServices, serde_json::Error> {
    let record: ReleaseRecord = device::read(raw)?;
    let text = |text: Option<&Text>| text.map(|text| text.to_string()).unwrap_or_default();
    let images = record.images.unwrap_or_default();
    let mut problems = Vec::new();
    if images.len() > MAX_SERVICES {
        problems.push(format!("it has {} services; the first {MAX_SERVICES} are read", images.len()));
    }
    let services = images.iter().take(MAX_SERVICES).filter_map(|image| service(image, &mut problems)).collect();
    Ok(ReleaseServices {
        id: record.id,
        version: text(record.raw_version.as_ref()),
        fleet: text(record.fleet.as_ref().and_then(|fleet| fleet.slug.as_ref())),
        services,
        problems,
    })
}

fn service(image: &ReleaseImage, problems: &mut Vec<String>) -> Option<Service> {
    let of_service = image.image.as_ref();
    let service = of_service.and_then(|image| image.service.as_ref());
    let Some(name) = service.and_then(|service| service.service_name.as_deref()) else {
        if image.labels.iter().flatten().next().is_some() {
            problems
                .push("the key may not see the name of a service, so the labels of that service are not read".into());
        }
        return None;
    };
    let mut labels = BTreeMap::new();
    for source in [&image.labels, &service?.overrides] {
        let source = source.as_deref().unwrap_or_default();
        if source.len() > MAX_LABELS {
            problems.push(format!("service {name} has {} labels; the first {MAX_LABELS} are read", source.len()));
        }
        for LabelRecord { label_name, value } in source.iter().take(MAX_LABELS) {
            let Some(label) = label_name.as_deref() else { continue };
            // A label without a value is there, and empty.
            let value = value.as_deref().unwrap_or_default();
            if label.len().max(value.len()) <= MAX_LABEL_SIZE {
                labels.insert(label.to_owned(), value.to_owned());
            } else {
                let label = up_to(80, label);
                problems.push(format!(
                    "label {label} of service {name} has more than {MAX_LABEL_SIZE} bytes and is not read"
                ));
            }
        }
    }
    Some(Service { image: of_service?.id, name: name.to_owned(), labels })
}
