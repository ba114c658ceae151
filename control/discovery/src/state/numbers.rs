//! Numbers of services, from which their virtual addresses follow.

use std::collections::BTreeMap;
use std::sync::Arc;

use flynn_api::discovery::{Event, VirtualNetworks};
use flynn_api::{Error, ErrorCode};

use super::{State, service_event};
use crate::command::Command;

impl State {
    /// The next number after the one given last that nobody has.
    pub(super) fn free_number(&self) -> Result<u32, Error> {
        let greatest = self.networks().greatest();
        let mut taken = vec![false; greatest as usize + 1];
        for (_, of) in self.services() {
            if let Some(taken) = taken.get_mut(of.number as usize) {
                *taken = true;
            }
        }
        let last = self.last_number.min(greatest);
        let mut free = (last + 1..=greatest).chain(1..=last);
        free.find(|number| !taken[*number as usize]).ok_or_else(|| {
            let message = format!(
                "{} has virtual addresses for {greatest} services, which there are: remove some, or bootstrap with a \
                 larger network",
                self.networks().ipv4
            );
            Error::new(ErrorCode::LimitExceeded, message)
        })
    }

    /// What the leader proposes when there are services without a number, which an earlier release has made: numbers for
    /// those, and along with them all that were given, so that every member comes to the same whatever it began with.
    pub fn numbering(&self) -> Option<Command> {
        let unnumbered: Vec<_> = self.services().filter(|(_, of)| of.number == 0).collect();
        if unnumbered.is_empty() {
            return None;
        }
        let mut with_them = self.clone();
        for (service, _) in unnumbered {
            let number = with_them.free_number().ok()?;
            with_them.last_number = number;
            Arc::make_mut(with_them.services.get_mut(service)?).number = number;
        }
        Some(Command::NumberServices {
            numbers: with_them
                .services()
                .map(|(name, of)| (name.clone(), of.number))
                .collect(),
            last: with_them.last_number,
        })
    }

    /// A service that was made after the proposal is numbered after all others: members may not agree on what it has.
    pub(super) fn number(&mut self, index: u64, numbers: &BTreeMap<String, u32>, last: u32) -> Vec<Event> {
        let networks = self.networks();
        let before: Vec<u32> = self.services().map(|(_, of)| of.number).collect();
        let mut later = Vec::new();
        for (service, of) in &mut self.services {
            let number = numbers.get(service).copied().unwrap_or(0);
            Arc::make_mut(of).number = number;
            if number == 0 {
                later.push(service.clone());
            }
        }
        self.last_number = last;
        for service in later {
            let number = self.free_number().unwrap_or(0);
            if let Some(of) = self.services.get_mut(&service) {
                Arc::make_mut(of).number = number;
                self.last_number = number;
            }
        }
        let changed = self
            .services()
            .zip(before)
            .filter(|((_, of), before)| of.number != *before);
        changed
            .map(|((service, of), _)| service_event(service, of, networks, index))
            .collect()
    }

    pub(super) fn set_networks(
        &mut self,
        index: u64,
        networks: VirtualNetworks,
    ) -> Result<Vec<Event>, Error> {
        if self.networks == Some(networks) {
            return Ok(Vec::new());
        }
        if let Some(present) = self.networks {
            let message = format!(
                "virtual addresses are from {} and {}, and programs rely on them: they cannot be moved",
                present.ipv4, present.ipv6
            );
            return Err(Error::conflict(message));
        }
        if self.services().any(|(_, of)| of.number > networks.greatest()) {
            return Err(Error::conflict(format!(
                "{} is too small for the services that there are",
                networks.ipv4
            )));
        }
        let moved = networks != self.networks();
        self.networks = Some(networks);
        let services = self.services().filter(|_| moved);
        Ok(services
            .map(|(service, of)| service_event(service, of, networks, index))
            .collect())
    }
}
