//! A map of the kernel's with our own copy of it.

use std::{collections::HashMap, hash::Hash, io};

use aya::{
    Ebpf, Pod,
    maps::{HashMap as KernelMap, MapData, MapError},
};

use crate::{
    error::{Error, Refusal, Result},
    maps::take,
};

/// A hash map that only this process adds to and removes from. What it has is read once; afterwards only changes go to the
/// kernel.
pub(crate) struct Mirror<K, V> {
    name: &'static str,
    kernel: KernelMap<MapData, K, V>,
    copy: HashMap<K, V>,
}

impl<K: Pod + Eq + Hash, V: Pod + PartialEq> Mirror<K, V> {
    pub(crate) fn take(object: &mut Ebpf, name: &'static str) -> Result<Self> {
        let kernel: KernelMap<MapData, K, V> = take(object, name)?;
        let read = || -> Result<_, Refusal> { Ok(kernel.iter().collect::<Result<_, _>>()?) };
        let copy = read().map_err(Error::kernel(format!("reading the eBPF map {name}")))?;
        Ok(Self { name, kernel, copy })
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.copy.get(key)
    }

    /// What the kernel has, where programs write to entries as well.
    pub(crate) fn read(&self, key: &K) -> Result<Option<V>> {
        match self.kernel.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => {
                let what = format!("reading the eBPF map {}", self.name);
                Err(Error::kernel(what)(error.into()))
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.copy.iter()
    }

    /// Its name, its entries, and how many there is room for.
    pub(crate) fn fill(&self, room: u32) -> (&'static str, u64, u64) {
        (self.name, self.copy.len() as u64, room.into())
    }

    /// Writes an entry, if it is not there as it is.
    pub(crate) fn put(&mut self, key: K, value: V) -> Result<()> {
        if self.copy.get(&key) == Some(&value) {
            return Ok(());
        }
        let what = || format!("writing to the eBPF map {}", self.name);
        let written = self.kernel.insert(key, value, 0);
        written.map_err(|error| Error::kernel(what())(error.into()))?;
        self.copy.insert(key, value);
        Ok(())
    }

    /// Removes an entry: what it was.
    pub(crate) fn remove(&mut self, key: &K) -> Result<Option<V>> {
        if !self.copy.contains_key(key) {
            return Ok(None);
        }
        match self.kernel.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let what = format!("removing from the eBPF map {}", self.name);
                return Err(Error::kernel(what)(error.into()));
            }
        }
        Ok(self.copy.remove(key))
    }

    /// Writes these entries beside those which are there.
    pub(crate) fn put_all(&mut self, wanted: &HashMap<K, V>) -> Result<()> {
        wanted.iter().try_for_each(|(&key, &value)| self.put(key, value))
    }

    /// Removes the entries that nobody wants.
    pub(crate) fn remove_unless(&mut self, wanted: impl Fn(&K, &V) -> bool) -> Result<()> {
        let unwanted = self.copy.iter().filter(|(key, value)| !wanted(key, value));
        let unwanted: Vec<K> = unwanted.map(|(&key, _)| key).collect();
        unwanted.iter().try_for_each(|key| self.remove(key).map(drop))
    }

    /// Has the map hold these entries and no others. Entries which stay are there all the time.
    pub(crate) fn set(&mut self, wanted: &HashMap<K, V>) -> Result<()> {
        self.put_all(wanted)?;
        self.remove_unless(|key, _| wanted.contains_key(key))
    }
}
