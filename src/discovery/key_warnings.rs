//! Warns about a key that shows one device or none, and about a selection without a device: the API answers them without an
//! error.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use crate::balena::{Actor, Failure, Fetched, Reason, Request, Source, device};
use crate::secret::CREATE_KEY;
use crate::text::count;

const MAX_FLEETS: usize = 10;

/// Whether the API was asked whose key it is. A list of several devices needs no such request.
#[derive(Default)]
pub struct KeyOwner {
    asked: bool,
    /// Whether there was a device, or the log says that there is none.
    is_explained: bool,
}

impl KeyOwner {
    /// After a refresh that found so many devices, or failed: asks once about a key that shows at most one device, or that the
    /// API refuses. `spent` is the time since the refresh began: with it, this takes no longer than the time-out of a request.
    pub fn check(
        &mut self, source: &mut dyn Source, refreshed: &Result<(), Failure>, devices: usize,
        spent: &dyn Fn() -> Duration,
    ) {
        // A list that becomes empty later has its own warning.
        if refreshed.is_ok() && !self.is_explained {
            self.is_explained = true;
            if devices == 0 {
                log::warn!("the API lists no device{}", what_the_key_sees(source, spent()));
            }
        }
        let is_suspect = match refreshed {
            Ok(()) => devices <= 1,
            Err(failure) => failure.reason == Reason::Unauthorized,
        };
        if !is_suspect {
            self.asked &= refreshed.is_err();
        } else if !self.asked {
            self.asked = true;
            match owner(source, spent()) {
                Ok(Actor::Device) => {
                    log::warn!("the API key is a device's own and shows that one device only, or none: {CREATE_KEY}");
                }
                Ok(Actor::Application) => {
                    log::warn!("the API key is a provisioning key, which cannot read devices: {CREATE_KEY}");
                }
                Ok(Actor::User | Actor::Unknown) => {}
                Err(failure) => log::debug!("cannot find out whose key this is: {failure}"),
            }
        }
    }
}

/// Whose key it is.
fn owner(source: &mut dyn Source, spent: Duration) -> Result<Actor, Failure> {
    #[derive(Deserialize)]
    struct Whoami {
        #[serde(rename = "actorType")]
        actor: Actor,
    }
    let Fetched::Body { body, .. } = source.ask(Request::Owner, spent)? else { return Ok(Actor::Unknown) };
    Ok(serde_json::from_slice(&body).map_or(Actor::Unknown, |Whoami { actor }| actor))
}

/// What the key sees, selected or not, for the end of a sentence.
fn what_the_key_sees(source: &mut dyn Source, spent: Duration) -> String {
    let body = match source.ask(Request::EveryFleet, spent) {
        Ok(Fetched::Body { body, .. }) => body,
        Ok(_) => return String::new(),
        Err(failure) => return format!("; what the key sees cannot be read: {failure}"),
    };
    let devices = device::parse_page(&body).unwrap_or_default();
    if devices.is_empty() {
        return ": the key sees none. Is it the key of a user who may see the fleet?".into();
    }
    let mut fleets: BTreeMap<(u64, &str), usize> = BTreeMap::new();
    for fleet in devices.iter().filter_map(|device| device.fleet.as_ref()) {
        *fleets.entry((fleet.id.unwrap_or_default(), fleet.slug.as_deref().unwrap_or_default())).or_default() += 1;
    }
    let shown = fleets.iter().take(MAX_FLEETS);
    let shown: Vec<_> =
        shown.map(|((id, slug), devices)| format!("{slug} (id {id}, {})", count(*devices, "device"))).collect();
    let more = fleets.len().saturating_sub(MAX_FLEETS);
    let more = if more == 0 { String::new() } else { format!(" and {}", count(more, "more fleet")) };
    format!(" that --fleet (FLEET) and --tag (DEVICE_TAG) select; the key sees {}{more}", shown.join(", "))
}
