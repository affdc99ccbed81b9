#!/bin/sh
echo "a tiny model"
