//! Warns about a key that shows one device or none: the API answers it without an error.

use std::time::Duration;

use crate::balena::client::Actor;
use crate::balena::{Failure, Reason, Source};
use crate::key::CREATE_KEY;

/// Whether the API was asked whose key it is. A list of several devices needs no such request.
#[derive(Default)]
pub struct KeyOwner {
    asked: bool,
}

impl KeyOwner {
    /// After a refresh that found so many devices, or failed: asks once about a key that shows at most one device, or that the API
    /// refuses. With the time that the refresh took, this takes no longer than the time-out of a request.
    pub fn check(&mut self, source: &mut dyn Source, refreshed: &Result<(), Failure>, devices: usize, took: Duration) {
        let is_suspect = match refreshed {
            Ok(()) => devices <= 1,
            Err(failure) => failure.reason == Reason::Unauthorized,
        };
        if !is_suspect {
            self.asked &= refreshed.is_err();
        } else if !self.asked {
            self.asked = true;
            match source.owner(took) {
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
