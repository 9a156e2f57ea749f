//! A release as the API describes it: its services and their labels, as a fleet's `docker-compose.yml` has them.
//!
//! balena's build stores `labels:` of a service as `image_label`. The owner of a fleet can override a label for a service
//! (`service_label`), and a device's supervisor applies the override. Labels can change after the release was made.

use std::fmt::{self, Display, Formatter};
use std::num::NonZeroU64;

use serde::Deserialize;

use super::device::{Fleet, Text, one, up_to};

/// The most services of a release that are read.
const MAX_SERVICES: usize = 200;
/// The most labels of a service that are read, of each of its two kinds.
const MAX_LABELS: usize = 50;
/// The most bytes of the name or the value of a label: the API allows 300 characters.
const MAX_LABEL_SIZE: usize = 1200;

/// A release with the labels of its services. If it cannot be read, it must not be used in part either: that would drop targets.
#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct ReleaseServices<'a> {
    pub id: u64,
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
    pub id: Option<NonZeroU64>,
    /// None where the key may not read it.
    #[serde(rename = "is_a_build_of__service", default, deserialize_with = "one")]
    pub service: Option<ServiceRecord<'a>>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct ServiceRecord<'a> {
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

pub struct Service<'a> {
    pub image: Option<NonZeroU64>,
    pub name: &'a str,
    /// Those of its labels that were asked for: of the release, and the overrides of the fleet's owner, which count more.
    pub labels: [Vec<(&'a str, &'a str)>; 2],
}

impl Display for ReleaseServices<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let fleet = self.fleet.as_ref().and_then(|fleet| fleet.slug.as_deref());
        let version = self.raw_version.as_deref();
        write!(f, "release {} of fleet {}", version.unwrap_or_default(), fleet.unwrap_or_default())
    }
}

impl ReleaseServices<'_> {
    /// Its services, in the API's order. What is not read of it, and why, goes to `problems`.
    pub fn services(&self, problems: &mut Vec<String>) -> Vec<Service<'_>> {
        let images = self.images.as_deref().unwrap_or_default();
        if images.len() > MAX_SERVICES {
            problems.push(format!("it has {} services; the first {MAX_SERVICES} are read", images.len()));
        }
        images.iter().take(MAX_SERVICES).filter_map(|image| service(image, problems)).collect()
    }
}

fn service<'a>(image: &'a ReleaseImage, problems: &mut Vec<String>) -> Option<Service<'a>> {
    let of_service = image.image.as_ref();
    let service = of_service.and_then(|image| image.service.as_ref());
    let Some(name) = service.and_then(|service| service.service_name.as_deref()) else {
        if image.labels.iter().flatten().next().is_some() {
            problems
                .push("the key may not see the name of a service, so the labels of that service are not read".into());
        }
        return None;
    };
    let labels = [&image.labels, &service?.overrides].map(|source| {
        let mut labels = Vec::new();
        let source = source.as_deref().unwrap_or_default();
        if source.len() > MAX_LABELS {
            problems.push(format!("service {name} has {} labels; the first {MAX_LABELS} are read", source.len()));
        }
        for LabelRecord { label_name, value } in source.iter().take(MAX_LABELS) {
            let Some(label) = label_name.as_deref() else { continue };
            // A label without a value is there, and empty.
            let value = value.as_deref().unwrap_or_default();
            if label.len().max(value.len()) <= MAX_LABEL_SIZE {
                labels.push((label, value));
            } else {
                let label = up_to(80, label);
                problems.push(format!(
                    "label {label} of service {name} has more than {MAX_LABEL_SIZE} bytes and is not read"
                ));
            }
        }
        labels
    });
    Some(Service { image: of_service?.id, name, labels })
}
